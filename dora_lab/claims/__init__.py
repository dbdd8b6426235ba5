"""The claim ledger: what the report and its sources say, each claim with the function that tests it."""

from dora_lab.claims.ledger import (
    VERDICTS,
    Claim,
    Finding,
    NotHere,
    Outcome,
    claims_page,
    find_test,
    read_claims,
    run_claims,
    write_claims,
)

__all__ = [
    "VERDICTS",
    "Claim",
    "Finding",
    "NotHere",
    "Outcome",
    "claims_page",
    "find_test",
    "read_claims",
    "run_claims",
    "write_claims",
]
