"""The ledger: every claim has a test, no figure in it is typed by hand, and the page says what the tests say."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dora_lab.claims import (
    VERDICTS,
    Claim,
    Finding,
    NotHere,
    Outcome,
    claims_page,
    counts,
    find_test,
    layers,
    ledger,
    mini_faults,
    mini_runs,
    quotes,
    read_claims,
    report_runs,
    run_claims,
    write_claims,
)
from dora_lab.profiles import PROJECT
from dora_lab.tables import read_published

CLAIMS = read_claims()
MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (counts, layers, mini_faults, mini_runs, quotes, report_runs)
}
ROW = {"id": "a", "claim": "b", "where": "c", "how": "d", "test": "counts.saving"}
PAGE = PROJECT / "figures" / "claims.md"


def written(tmp_path, *rows):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(list(rows)))
    return path


def rows_of(page, ids):
    """{id: (claim, verdict, number, measured on)} of the page's rows, by the claims' words and tests."""
    cells = [re.split(r" \| ", line.strip("| \n")) for line in page.splitlines() if line.startswith("| ")][2:]
    by_words = {(row[0], row[5]): row for row in cells}
    return {claim.id: by_words[claim.claim, claim.test] for claim in CLAIMS if claim.id in ids}


# --- the ledger itself ------------------------------------------------------------------------------------------------


def test_there_are_at_least_twenty_claims_each_with_its_test():
    assert len(CLAIMS) >= 20 and set(MODULES) == set(ledger.TESTS)
    for claim in CLAIMS:
        assert find_test(claim).__doc__


def test_every_test_function_belongs_to_a_claim():
    named = {claim.test for claim in CLAIMS}
    for name, module in MODULES.items():
        for function, value in vars(module).items():
            own = callable(value) and getattr(value, "__module__", "") == module.__name__
            if own and not function.startswith("_") and getattr(value, "__annotations__", {}).get("return") is Outcome:
                assert f"{name}.{function}" in named


@pytest.mark.parametrize("test", ["counts.nothing", "nowhere.saving", "saving", "counts._share", "ledger.read_claims"])
def test_a_claim_without_a_test_is_refused(tmp_path, test):
    with pytest.raises(ValueError, match="claim a: its test .* is no function"):
        read_claims(written(tmp_path, ROW | {"test": test}))


@pytest.mark.parametrize("key", ["verdict", "number", "measured_on", "result"])
def test_a_measurement_typed_into_the_ledger_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match=key):
        read_claims(written(tmp_path, ROW | {key: "98.05"}))


def test_a_missing_field_and_a_repeated_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match="how"):
        read_claims(written(tmp_path, {key: value for key, value in ROW.items() if key != "how"}))
    with pytest.raises(ValueError, match="the id a"):
        read_claims(written(tmp_path, ROW, ROW))


def constant_texts(node):
    """The constant parts of every text inside a node; the digits of a format are not among them."""
    formats = {id(part) for one in ast.walk(node) if isinstance(one, ast.FormattedValue) for part in ast.walk(one)}
    inside = [one for one in ast.walk(node) if isinstance(one, ast.Constant) and id(one) not in formats]
    return [one.value for one in inside if isinstance(one.value, str)]


def typed_figures(function):
    """Digits in the texts that a test function makes its number or its measured_on of; names such as "Table 1" pass."""
    found = []
    for node in ast.walk(function):
        returned = isinstance(node, ast.Return) and isinstance(node.value, ast.Call)
        named = isinstance(node, ast.Assign | ast.AugAssign)
        texts = constant_texts(node.value) if returned or named else []
        if named and not any(isinstance(part, ast.JoinedStr) for part in ast.walk(node.value)):
            continue  # a key or a name, not a sentence
        for text in texts:
            bare = re.sub(r"LLaMA-7B|Table \d+|in 16 bits|\(version \d\)|below \d+ %|16 bits", "", text)
            found += re.findall(r"\d+[.,]?\d*", bare)
    return found


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_no_figure_in_an_outcome_is_typed_by_hand(claim):
    module, _, name = claim.test.partition(".")
    tree = ast.parse(Path(MODULES[module].__file__).read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert typed_figures(function) == []


def test_a_figure_typed_into_a_test_function_is_seen():
    tree = ast.parse(
        'def f(claimed):\n    number = f"{a:.1f} of 74.7 points"\n    return Outcome("holds", number, "x")'
    )
    assert typed_figures(tree.body[0]) == ["74.7"]
    tree = ast.parse('def f(claimed):\n    return Outcome("holds", "98.05 %", "all 1267")')
    assert typed_figures(tree.body[0]) == ["98.05", "1267"]


# --- running and writing ----------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_and_takes_no_verdict(monkeypatch):
    def missing(claimed):
        raise NotHere("the file x is not here: put it into y")

    monkeypatch.setattr(counts, "saving", missing)
    (finding,) = run_claims([Claim(**ROW, claimed={})])
    assert finding.outcome == Outcome("not testable here", "none", "the file x is not here: put it into y")


def test_an_error_in_a_test_is_not_a_verdict(monkeypatch):
    monkeypatch.setattr(counts, "saving", lambda claimed: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_claims([Claim(**ROW, claimed={})])


def test_the_page_counts_verdicts_and_has_a_row_a_claim(tmp_path):
    claim = Claim(**ROW | {"claim": "x | y"}, claimed={})
    findings = [Finding(claim, Outcome(verdict, "1", "z")) for verdict in VERDICTS]
    page = write_claims([*findings, findings[0]], tmp_path / "new").read_text()
    assert "- holds (2)" in page and "- depends (1)" in page and page.count("| x \\| y |") == 5


@pytest.mark.parametrize("module", ["counts", "quotes", "mini_runs", "mini_faults"])
def test_the_committed_page_is_what_the_tests_say_now(module):
    chosen = [claim for claim in CLAIMS if claim.test.startswith(module)]
    now = rows_of(claims_page(run_claims(chosen)), {claim.id for claim in chosen})
    assert rows_of(PAGE.read_text(), set(now)) == now, "figures/claims.md is out of date: run `dora-lab claims`"


@pytest.mark.slow
def test_the_committed_verdicts_of_layers_are_what_the_tests_say_now():
    """Their numbers are bytes and rounding errors, which another version of PyTorch may change."""
    chosen = [claim for claim in CLAIMS if claim.test.startswith("layers")]
    committed = rows_of(PAGE.read_text(), {claim.id for claim in chosen})
    for finding in run_claims(chosen):
        assert committed[finding.claim.id][2] == f"**{finding.outcome.verdict}**"


@pytest.mark.slow
def test_the_command_writes_the_page(tmp_path):
    command = [Path(sys.executable).with_name("dora-lab"), "claims", "--figures-dir", tmp_path / "figures"]
    environment = os.environ | {"DORA_LAB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "winogrande-ahead: not testable here" in done.stdout
    assert (tmp_path / "figures" / "claims.md").read_text().count("\n| ") == len(CLAIMS) + 2


@pytest.mark.real_data
def test_the_committed_rows_of_the_reports_files_are_what_the_tests_say_now(report_cache):
    chosen = [claim for claim in CLAIMS if claim.test.startswith("report_runs")]
    now = rows_of(claims_page(run_claims(chosen)), {claim.id for claim in chosen})
    assert rows_of(PAGE.read_text(), set(now)) == now, "figures/claims.md is out of date: run `dora-lab claims`"


def test_without_the_reports_files_their_claims_are_not_testable(tmp_path, monkeypatch):
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    need = (
        "winogrande-ahead",
        "winogrande-row",
        "same-form",
        "same-prompt",
        "answers-are-trained",
        "full-data-winogrande",
    )
    for finding in run_claims([claim for claim in CLAIMS if claim.id in need]):
        assert finding.outcome.verdict == "not testable here"
        assert str(tmp_path) in finding.outcome.measured_on


# --- verdicts follow the measurement ----------------------------------------------------------------------------------


def test_the_verdict_of_a_quotation_follows_the_printed_tables(monkeypatch):
    published = read_published()
    for row in published["rows"]:
        if row["where"] == "Figure 2, row 'Paper's DoRA'":
            row["accuracy_pct"]["winogrande"] = 81.0
    assert quotes.quoted({"method": "dora", "task": "winogrande"}).verdict == "does not hold"
    monkeypatch.setattr(quotes, "read_published", lambda: published)
    assert quotes.quoted({"method": "dora", "task": "winogrande"}).verdict == "holds"


def test_another_rank_saves_another_share():
    claimed = {"features": 1024, "rank": 10, "percent": 98}
    assert counts.saving(claimed).verdict == "holds"
    assert counts.saving(claimed | {"rank": 64}).verdict == "does not hold"


def test_printed_accuracies_close_together_are_not_told_apart(monkeypatch):
    claimed = {"task": "boolq", "questions": 3270}
    monkeypatch.setattr(report_runs, "reported", lambda whose, method: {"boolq": 63.5 if method == "lora" else 63.6})
    assert report_runs.ahead_by_counts(claimed).verdict == "depends"
    monkeypatch.setattr(report_runs, "reported", lambda whose, method: {"boolq": 63.5 if method == "dora" else 63.6})
    assert report_runs.ahead_by_counts(claimed).verdict == "does not hold"


def test_a_larger_gpu_changes_nothing_about_the_examples():
    outcome = counts.aggregated_memory({"gigabytes": 16})
    assert outcome.verdict == "holds"
    assert replace(outcome, verdict="") == replace(counts.aggregated_memory({"gigabytes": 80}), verdict="")
