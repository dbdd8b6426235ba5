"""Tables, sentences and figures of comparisons: they say what the intervals say, and no more."""

import re

import numpy as np
import pandas as pd
import pytest

from dora_lab.comparison_figures import (
    difference_lines,
    difference_lines_alt,
    outcome_bars,
    outcome_bars_alt,
    sweep_lines,
    sweep_lines_alt,
)
from dora_lab.comparison_tables import (
    comparison_notes,
    comparison_table,
    difference_intervals,
    furthest_apart,
    mcnemar_table,
    question_shares,
    question_table,
    sweep_section,
    sweep_table,
)
from dora_lab.comparisons import count_pairs
from dora_lab.pipeline import RECORDED
from dora_lab.statistics import Interval, paired_difference
from dora_lab.sweep import SWEEP, read_sweep


def runs(correct):
    """{seed: {id: right}} of a (seeds, items) array."""
    return {seed: {f"q-{item}": bool(right) for item, right in enumerate(row)} for seed, row in enumerate(correct)}


@pytest.fixture(scope="module")
def answers():
    """BoolQ: DoRA clearly ahead. WinoGrande: nothing to tell. HellaSwag: DoRA only."""
    generator = np.random.default_rng(0)
    luck = generator.random((5, 3, 200))
    return {
        ("boolq", "lora"): runs(luck[0] < 0.6),
        ("boolq", "dora"): runs(luck[1] < 0.9),
        ("winogrande", "lora"): runs(luck[2] < 0.7),
        ("winogrande", "dora"): runs(luck[3] < 0.7),
        ("hellaswag", "dora"): runs(luck[4] < 0.8),
    }


def test_a_row_is_the_paired_difference_in_points(answers):
    table = comparison_table(answers).set_index("task")
    assert list(table.index) == ["BoolQ", "WinoGrande"]
    found = paired_difference(answers["boolq", "dora"], answers["boolq", "lora"])
    row = table.loc["BoolQ"]
    assert (row["points"], row["low"], row["high"]) == pytest.approx(
        (100 * found.estimate, 100 * found.low, 100 * found.high)
    )
    assert row["said"] == "ahead" and row["p (Holm)"] == pytest.approx(2 * row["p"]) and row["p"] < 0.05
    assert table.loc["WinoGrande", "said"] == "no difference shown" and not table.loc["WinoGrande", "within 1 point"]


def test_the_macro_average_comes_first(answers):
    found = difference_intervals(answers)
    assert list(found) == ["all tasks", "BoolQ", "WinoGrande"]
    assert found["all tasks"].estimate == pytest.approx((found["BoolQ"].estimate + found["WinoGrande"].estimate) / 2)


def test_notes_never_say_ahead_where_the_interval_crosses_zero(answers):
    primary, tasks = comparison_notes(answers)
    assert primary.startswith("Primary comparison, macro-average") and "(2 tasks)" in primary
    assert "ahead: 1; not told apart: 1; behind: 0" in tasks
    same = {key: value for key, value in answers.items() if key[0] == "winogrande"}
    primary, tasks = comparison_notes(same)
    assert primary.endswith("no difference shown.") and "ahead: 0; not told apart: 1" in tasks


def test_without_both_methods_there_is_nothing_to_say(answers):
    alone = {("hellaswag", "dora"): answers["hellaswag", "dora"]}
    assert comparison_notes(alone) == [] and difference_intervals(alone) == {}
    assert comparison_table(alone).empty and mcnemar_table(alone).empty


def test_mcnemar_has_a_row_a_seed(answers):
    table = mcnemar_table(answers)
    assert len(table) == 6
    pairs = count_pairs(answers["boolq", "dora"][1], answers["boolq", "lora"][1])
    row = table[(table["task"] == "BoolQ") & (table["seed"] == 1)].iloc[0]
    assert (row["only DoRA"], row["only LoRA"], row["p"]) == (pairs.first_only, pairs.second_only, pairs.p_value)


def test_questions_are_counted_by_how_many_seeds_got_them_right():
    answers = {("boolq", "lora"): runs([[1, 1, 0, 0], [1, 0, 0, 0]]), ("boolq", "dora"): runs([[1, 1, 0, 1]] * 2)}
    assert question_shares(answers["boolq", "lora"]) == {"q-0": 1, "q-1": 0.5, "q-2": 0, "q-3": 0}
    lora, dora = question_table(answers).to_dict("records")
    assert (lora["every seed"], lora["some seeds"], lora["no seed"]) == (1, 1, 2)
    assert (dora["every seed"], dora["some seeds"], dora["no seed"]) == (3, 0, 1)
    assert furthest_apart(answers, "boolq", 2) == [("q-3", 0, 1), ("q-1", 0.5, 1)]


def sweep_rows():
    scores = {
        ("lora", 0.1): [0.5, 0.6],
        ("lora", 1.0): [0.8, 0.8],
        ("dora", 0.1): [0.7, 0.7],
        ("dora", 1.0): [0.9, None],
    }
    return [
        {"task": "boolq", "method": method, "learning_rate": rate, "seed": seed, "accuracy": accuracy}
        for (method, rate), values in scores.items()
        for seed, accuracy in enumerate(values)
    ]


def test_the_sweep_is_shown_at_one_rate_and_at_each_best():
    table = sweep_table(sweep_rows()).set_index("rate")
    assert list(table.index) == ["0.1", "1", "each at its best"]
    assert table.loc["0.1", ["LoRA", "DoRA", "points"]].tolist() == pytest.approx([55, 70, 15])
    assert pd.isna(table.loc["1", "DoRA"])  # a rate at which a run failed
    assert table.loc["each at its best", ["LoRA", "DoRA"]].tolist() == pytest.approx([80, 70])


def test_the_results_page_has_the_sweep_in_text():
    ((heading, (said, shown)),) = sweep_section(sweep_rows()).items()
    assert heading == "One rate for both, and each at its best" and "mean over 2 seeds" in said
    assert shown.to_numpy().tolist() == [
        ["BoolQ", "0.1", "55.0", "70.0", "+15.0"],
        ["BoolQ", "1", "80.0", "failed", "failed"],
        ["BoolQ", "each at its best", "80.0", "70.0", "-10.0"],
    ]
    assert sweep_section([]) == {}


def test_the_sweeps_figure_rings_the_best_and_marks_what_failed():
    (axes,) = sweep_lines(sweep_rows()).axes
    rings = {tuple(line.get_xydata()[0].round(6)) for line in axes.lines if line.get_markersize() == 11}
    assert rings == {(1.0, 80.0), (0.1, 70.0)}
    assert sum(line.get_marker() == "x" for line in axes.lines) == 1
    assert "BoolQ, DoRA: best 70.0 % at 0.1, 2 rates" in sweep_lines_alt(sweep_rows())


def test_the_recorded_sweep_is_drawn_with_a_panel_a_task():
    rows = read_sweep(RECORDED / "mini" / SWEEP)
    assert len(sweep_lines(rows).axes) == 3
    assert sweep_lines_alt(rows).count("best") == len({(row["task"], row["method"]) for row in rows})


def test_an_open_square_is_a_difference_that_is_not_shown():
    differences = {"a": Interval(0.05, 0.01, 0.09), "b": Interval(0.01, -0.02, 0.04)}
    (axes,) = difference_lines(differences, "x").axes
    faces = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "s"]
    assert faces[0] != "white" and faces[1] == "white"
    alt = difference_lines_alt(differences, "x")
    assert "a +5.0 (+1.0 to +9.0), ahead" in alt and "b +1.0 (-2.0 to +4.0), no difference shown" in alt


def test_outcome_bars_fill_each_row():
    counts = {"LoRA": {"right": 6, "wrong": 3, "unread": 1}, "DoRA": {"right": 8, "wrong": 2, "unread": 0}}
    (axes,) = outcome_bars(counts, "x").axes
    widths = np.array([[bar.get_width() for bar in container] for container in axes.containers])
    assert widths.sum(axis=0) == pytest.approx([100, 100]) and len({tuple(w) for w in widths}) == 3
    assert re.search(r"LoRA: 6 right, 3 wrong, 1 unread; DoRA: 8 right", outcome_bars_alt(counts, "x"))
