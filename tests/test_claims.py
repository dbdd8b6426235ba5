"""The ledger: every claim has a test, no figure in it is typed by hand, and the page says what the tests say."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
from dora_lab.statistics import Interval
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


NAMES = re.compile(r"(?i)LLaMA-7B|Figure \d+|Table \d+|16 bits|version \d|below \d+ %|artanh r|1 − r²|Wilson's 90 %")
KNOWN = {0, 1, 2, 100, 1e9, 0.9, 4}  # units, places in a list, the level of two one-sided tests
ALLOWED = {  # settings of a measurement, limits of rounding, quantiles: none of them is a result
    "counts": {"nearly_full": ["8", "16"], "axis_of_magnitude": ["8", "8"]},
    "layers": {
        "detached_memory": ["96", "160", "32"],
        "cost_of_training": ["64", "256"],
        "merged_cost": ["64", "128", "24", "8", "16", "0.05", "0.0001"],
    },
    "mini_runs": {"step_time": ["0.25", "0.75"]},
    "quotes": {"averages": ["0.05", "1e-09"], "average_gain": ["0.05"]},
    "report_runs": {"ahead_by_counts": ["200", "0.05"]},
}


def typed_figures(function):
    """Figures that stand in a function's code: digits in its texts, numbers that no text, format or unit explains.

    What a claim brings along (`claimed`) and what is computed are no constants. Names such as "Table 1" pass.
    """
    body = function.body[1:] if ast.get_docstring(function) else function.body
    nodes = [part for statement in body for part in ast.walk(statement)]
    formats = {id(part) for one in nodes if isinstance(one, ast.FormattedValue) and one.format_spec
               for part in ast.walk(one.format_spec)}  # fmt: skip
    constants = [one.value for one in nodes if isinstance(one, ast.Constant) and id(one) not in formats]
    found = []
    for value in constants:
        if isinstance(value, str):
            found += re.findall(r"\d+(?:[.,]\d+)?", re.sub(r"\{[^}]*\}", "", NAMES.sub("", value)))
        elif isinstance(value, int | float) and not isinstance(value, bool) and value not in KNOWN:
            found.append(str(value))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_figure_in_an_outcome_is_typed_by_hand(module):
    tree = ast.parse(Path(MODULES[module].__file__).read_text())
    found = {node.name: typed_figures(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {name: figures for name, figures in found.items() if figures} == ALLOWED.get(module, {})


@pytest.mark.parametrize(
    ("code", "figures"),
    [
        ('number = f"{a:.1f} of 74.7 points"', ["74.7"]),
        ('return Outcome("holds", "98.05 %", "all 1267")', ["98.05", "1267"]),
        ('number = "98.05 % less"', ["98.05"]),
        ('number = f"{98.05:.2f} % less"', ["98.05"]),
        ('value = 74.7\n    number = f"{value} %"', ["74.7"]),
        ('parts.append("accuracy 74.7")', ["74.7"]),
        ('number = f"{100 * share:.1f} % by the paper, Table 1"', []),
    ],
)
def test_a_figure_typed_into_a_test_function_is_seen(code, figures):
    assert typed_figures(ast.parse(f"def f(claimed):\n    {code}").body[0]) == figures


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


@pytest.mark.parametrize(
    "module",
    ["counts", "quotes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mini_runs", "mini_faults"))],
)
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


@pytest.mark.slow
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
        "full-data-hellaswag",
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
    assert report_runs.ahead_by_counts(claimed).verdict == "depends"
    monkeypatch.setattr(report_runs, "reported", lambda whose, method: {"boolq": 3.5 if method == "dora" else 93.6})
    assert report_runs.ahead_by_counts(claimed).verdict == "does not hold"
    monkeypatch.setattr(report_runs, "reported", lambda whose, method: {"boolq": 3.5 if method == "lora" else 93.6})
    assert report_runs.ahead_by_counts(claimed).verdict == "depends"  # what could not be read is not known


def test_a_larger_gpu_changes_nothing_about_the_examples():
    outcome = counts.aggregated_memory({"gigabytes": 16})
    assert outcome.verdict == "holds"
    assert replace(outcome, verdict="") == replace(counts.aggregated_memory({"gigabytes": 80}), verdict="")


MADE = ("boolq", "hellaswag")


def made(**shares):
    """task -> seed -> answers: of 400 questions a share is right, the first ones; the shares of each seed are given."""
    return {
        task: {seed: {f"q{i}": i < 400 * share for i in range(400)} for seed, share in enumerate(own)}
        for task, own in shares.items()
    }


def with_answers(monkeypatch, dora, lora):
    found = {"dora": made(**dora), "lora": made(**lora)}
    monkeypatch.setattr(mini_runs, "_answers", lambda method, rank: found[method])


HALF = dict.fromkeys(MADE, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("dora", "verdict"),
    [
        ({"boolq": (0.8, 0.81, 0.79), "hellaswag": (0.8, 0.81, 0.79)}, "holds"),
        ({"boolq": (0.8, 0.81, 0.79), "hellaswag": (0.2, 0.21, 0.19)}, "does not hold"),  # one clear loss
        ({"boolq": (0.8, 0.81, 0.79), "hellaswag": (0.5, 0.5, 0.5)}, "depends"),
        ({"boolq": (0.9, 0.2, 0.5), "hellaswag": (0.8, 0.81, 0.79)}, "depends"),
    ],
)
def test_all_tasks_have_to_be_won_and_one_loss_contradicts(monkeypatch, dora, verdict):
    with_answers(monkeypatch, dora, HALF)
    assert mini_runs.ahead_on_every_task({"level": 0.05}).verdict == verdict


@pytest.mark.parametrize(
    ("dora", "verdict"),
    [
        (dict.fromkeys(MADE, (0.7, 0.8, 0.9)), "holds"),
        (dict.fromkeys(MADE, (0.5, 0.5, 0.5)), "does not hold"),  # no run says anything
        (dict.fromkeys(MADE, (0.9, 0.1, 0.9)), "does not hold"),  # runs contradict each other
        ({"boolq": (0.7, 0.8, 0.9), "hellaswag": (0.9, 0.1, 0.9)}, "depends"),
    ],
)
def test_one_run_is_enough_only_where_every_seed_says_the_same(monkeypatch, dora, verdict):
    with_answers(monkeypatch, dora, HALF)
    assert mini_runs.one_run_each({"level": 0.05}).verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.8, 0.5, "holds"), (0.5, 0.8, "does not hold"), (0.8, 0.8, "depends"), (0.5, 0.2, "depends")],
)
def test_a_lead_at_low_ranks_is_the_difference_of_two_leads(monkeypatch, low, high, verdict):
    shares = {("dora", 1): low, ("dora", 8): high, ("lora", 1): 0.5, ("lora", 8): 0.5}
    found = {key: made(**dict.fromkeys(MADE, (share, share + 0.01, share - 0.01))) for key, share in shares.items()}
    monkeypatch.setattr(mini_runs, "_answers", lambda method, rank: found[method, rank])
    outcome = mini_runs.ahead_at_low_ranks({"ranks": [1, 8]})
    assert outcome.verdict == verdict and "3 seeds" in outcome.measured_on


@pytest.mark.parametrize(
    ("function", "dora", "verdict"),
    [
        (mini_runs.ahead_on_average, 0.8, "holds"),
        (mini_runs.ahead_on_average, 0.2, "does not hold"),
        (mini_runs.ahead_on_average, 0.5, "depends"),
        (mini_runs.seeds_fluctuate, 0.5, "holds"),
        (mini_runs.seeds_fluctuate, 0.9, "does not hold"),
    ],
)
def test_the_verdict_of_an_average_follows_its_interval(monkeypatch, function, dora, verdict):
    with_answers(
        monkeypatch, dict.fromkeys(MADE, (dora, dora + 0.02, dora - 0.02)), dict.fromkeys(MADE, (0.5, 0.52, 0.48))
    )
    assert function({}).verdict == verdict


def geometry_rows(slopes, noise):
    """Made rows of three seeds: ΔM follows ΔD with a slope, and noise around the line, by method."""
    generator, rows = np.random.default_rng(0), []
    for method, slope in slopes.items():
        for seed in range(3):
            for layer in range(6):
                for step in (1, 2, 3, 4):
                    x = step + 0.1 * layer + 0.01 * seed
                    own = {"method": method, "seed": seed, "step": step, "layer": layer, "module": "q_proj"}
                    y = slope * x + noise[method] * generator.normal()
                    rows.append(own | {"delta_direction": x, "delta_magnitude": y})
    return rows


FALLING = {"full": -1, "dora": -1, "lora": 1}
LOUD = {"full": 0.5, "dora": 0.5, "lora": 0.01}


@pytest.mark.parametrize(
    ("slopes", "noise", "nearer", "varies", "sign"),
    [
        (FALLING, LOUD, "holds", "holds", "holds"),
        ({"full": 1, "dora": -1, "lora": 1}, LOUD | {"full": 0.01}, "does not hold", "depends", "does not hold"),
    ],
)
def test_the_verdicts_of_the_geometry_follow_its_rows(monkeypatch, slopes, noise, nearer, varies, sign):
    monkeypatch.setattr(mini_runs, "_geometry", lambda: {"boolq": geometry_rows(slopes, noise)})
    assert mini_runs.more_like_full({}).verdict == nearer
    assert mini_runs.varies_more({"more": "full", "less": "lora"}).verdict == varies
    assert mini_runs.geometry({"method": "full", "correlation": -0.62}).verdict == sign


def test_to_vary_more_than_full_fine_tuning_is_not_to_be_nearer_to_it(monkeypatch):
    over = {"full": 0.4, "lora": 0.2, "dora": 9.0}  # 1 - r² of about 0.1, 0.05 and 0.9
    near = {"full": 9.0, "lora": 0.2, "dora": 9.0}
    for noise, verdict in ((over, "does not hold"), (near, "holds")):
        rows = geometry_rows(dict.fromkeys(noise, 1), noise)
        monkeypatch.setattr(mini_runs, "_geometry", lambda rows=rows: {"boolq": rows})
        assert mini_runs.variance_nearer_to_full({}).verdict == verdict


@pytest.mark.parametrize(("room", "verdict"), [(36, "holds"), (40, "depends")])
def test_one_micro_batch_that_nearly_fills_the_gpu_is_enough(room, verdict):
    assert counts.nearly_full({"gigabytes": room, "from_share": 0.9}).verdict == verdict


@pytest.mark.parametrize(("margin", "verdict"), [(1, "depends"), (100, "holds")])
def test_that_no_fault_moves_the_comparison_is_shown_within_a_margin(monkeypatch, margin, verdict):
    turns = [Interval(0.01, -0.2, 0.22, seeds=3), Interval(0.0, -0.001, 0.001, seeds=3)]
    made = [SimpleNamespace(turn=turn, seeds=(0, 1, 2)) for turn in turns]
    monkeypatch.setattr(mini_faults, "_effects", lambda: made)
    monkeypatch.setattr(mini_faults, "uneven", lambda several: [])
    assert mini_faults.comparison_stays({"level": 0.05, "within_points": margin}).verdict == verdict


def test_another_file_than_the_pinned_one_is_not_here_and_ends_nothing(monkeypatch):
    def refused(method):
        raise ValueError("outputs.json is not the pinned file")

    monkeypatch.setattr(report_runs, "read_outputs", refused)
    (finding,) = run_claims([claim for claim in CLAIMS if claim.id == "winogrande-ahead"])
    assert finding.outcome.verdict == "not testable here" and "not the pinned file" in finding.outcome.measured_on


@pytest.mark.parametrize("lost", [0, 7])
def test_a_shortfall_has_another_explanation_where_answers_are_cut(monkeypatch, lost):
    lengths = [300] * lost + [100] * 10
    monkeypatch.setattr(report_runs, "_examples", lambda name: (lengths, "made"))
    monkeypatch.setattr(report_runs, "_tokenizer", lambda: None)
    monkeypatch.setattr(report_runs, "token_counts", lambda tokenizer, examples: examples)
    (finding,) = run_claims([claim for claim in CLAIMS if claim.id == "full-data-hellaswag"])
    assert finding.outcome.verdict == ("depends" if lost else "not testable here")


def test_the_committed_page_has_every_claim_once_and_counts_its_verdicts():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert sorted(row.split(" | ")[0].removeprefix("| ") for row in rows) == sorted(claim.claim for claim in CLAIMS)
    for verdict in VERDICTS:
        assert f"- {verdict} ({sum(f'| **{verdict}** |' in row for row in rows)}): " in PAGE.read_text()


@pytest.mark.parametrize(
    ("paper", "verdict"), [(63.6, "depends"), (90.0, "does not hold")], ids=["near, but few questions", "far"]
)
def test_similar_needs_a_margin_that_the_interval_keeps(monkeypatch, paper, verdict):
    monkeypatch.setattr(quotes, "reported", lambda whose, method: {"boolq": 63.5})
    monkeypatch.setattr(quotes, "_printed", lambda source, method: {"boolq": paper})
    assert quotes.similar({"within_points": 2, "questions": {"boolq": 300}}).verdict == verdict
    if verdict == "depends":
        assert quotes.similar({"within_points": 2, "questions": {"boolq": 30_000}}).verdict == "holds"
