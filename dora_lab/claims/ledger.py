"""Claims in, verdicts out: `data/claims.yaml` names for each claim a function, the function measures and says.

The YAML holds what others have said (`claimed` are their numbers) and never a measurement or a verdict.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from dora_lab.files import write_text
from dora_lab.profiles import PROJECT, explain

CLAIMS = PROJECT / "data" / "claims.yaml"
# modules of this package that hold tests
TESTS = ("counts", "layers", "mini_faults", "mini_runs", "quotes", "report_runs")
Verdict = Literal["holds", "does not hold", "depends", "not testable here"]
VERDICTS = Verdict.__args__
MEANING = {
    "holds": "the measurement agrees",
    "does not hold": "the measurement contradicts it",
    "depends": "true in part, in some settings only, or the measurement cannot tell",
    "not testable here": "a file or a machine is missing; nothing takes its place",
}


class NotHere(Exception):
    """Raised by a test that lacks a file or a machine; the message says which, and where to put it."""


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Claim:
    """One claim: its words in short, where it stands, how it is tested, the test `module.function`, others' numbers."""

    id: str
    claim: str
    where: str
    how: str
    test: str
    claimed: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a test measured: the verdict, the number in a few words, and what it was measured on."""

    verdict: Verdict
    number: str
    measured_on: str


def verdict_of(agreed: Iterable[bool]) -> Verdict:
    """Of a claim about several things: it holds if all agree, does not if none does, and depends if some do."""
    agreed = list(agreed)
    return "holds" if all(agreed) else "depends" if any(agreed) else "does not hold"


def verdict_by(said: Iterable[str], supports: str, contradicts: str) -> Verdict:
    """Of what intervals let one say of each thing: all one way, all the other way, or else it depends."""
    return {frozenset([supports]): "holds", frozenset([contradicts]): "does not hold"}.get(frozenset(said), "depends")


@dataclass(frozen=True)
class Finding:
    """A claim with its outcome."""

    claim: Claim
    outcome: Outcome


def read_claims(path: str | Path | None = None) -> list[Claim]:
    """The claims of a ledger, `data/claims.yaml` unless told.

    Raises ValueError for a key that is missing or not known, an id that is given twice, or a test that does not exist.
    """
    path = CLAIMS if path is None else Path(path)
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        claims = TypeAdapter(list[Claim]).validate_python([{"claimed": {}} | row for row in rows])
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}: correct it") from error
    twice = [one for one, count in Counter(claim.id for claim in claims).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: two claims have the id {', '.join(twice)}: give each its own")
    for claim in claims:
        find_test(claim)
    return claims


def find_test(claim: Claim) -> Callable[[Mapping[str, Any]], Outcome]:
    """The function that tests a claim. Raises ValueError if there is none of that name."""
    module, _, name = claim.test.partition(".")
    found = None
    if module in TESTS and name and not name.startswith("_"):
        found = getattr(importlib.import_module(f"dora_lab.claims.{module}"), name, None)
    if not callable(found):
        raise ValueError(f"claim {claim.id}: its test {claim.test!r} is no function of {', '.join(TESTS)}: write it")
    return found


def run_claims(claims: Iterable[Claim], report: Callable[[str], None] = lambda line: None) -> list[Finding]:
    """Test every claim; what is missing makes a claim "not testable here", any other error is raised."""
    findings = []
    for claim in claims:
        try:
            outcome = find_test(claim)(claim.claimed)
        except NotHere as missing:
            outcome = Outcome("not testable here", "none", str(missing))
        report(f"{claim.id}: {outcome.verdict}; {outcome.number}")
        findings.append(Finding(claim, outcome))
    return findings


def claims_page(findings: Iterable[Finding]) -> str:
    """The page `claims.md`: how many of each verdict, then one row a claim."""
    findings = list(findings)
    count = Counter(finding.outcome.verdict for finding in findings)
    lines = ["# The claims, tested", "", "Made by `dora-lab claims` from `data/claims.yaml`.", ""]
    lines += [f"- {verdict} ({count[verdict]}): {MEANING[verdict]}" for verdict in VERDICTS]
    lines += [
        "",
        "The mini-world is another model with other data: what is measured there decides nothing about LLaMA-7B.",
    ]
    header = ("claim", "where", "verdict", "number", "measured on", "test")
    lines += ["", "| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"]
    for finding in findings:
        claim, outcome = finding.claim, finding.outcome
        cells = (claim.claim, claim.where, f"**{outcome.verdict}**", outcome.number, outcome.measured_on, claim.test)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_claims(findings: Iterable[Finding], folder: str | Path) -> Path:
    """Write `claims.md` into the folder and return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "claims.md", claims_page(findings))
    return folder / "claims.md"
