"""The results table: what it says is what the records say, and failures are neither missing nor zero."""

import csv
import math
from dataclasses import replace

import pandas as pd
import pytest
from made_records import FAILURES, PUBLISHED, RECORDS, TASKS, Record, Result, Spec, make_records

from dora_lab import tables
from dora_lab.statistics import seed_interval


def row_of(table, name):
    return table[table["row"] == name].iloc[0]


def test_rows_and_columns_are_the_reports_figure_2():
    table = tables.results_table(RECORDS, [], PUBLISHED, "mini")
    names = ["paper LoRA", "report LoRA", "this run LoRA", "paper DoRA", "report DoRA", "this run DoRA"]
    assert list(table["row"]) == [*names, "this run full fine-tuning"]
    assert list(tables.shown_table(table)) == ["row", "model", "rank", "BoolQ", "HellaSwag", "WinoGrande"]
    assert set(table.loc[table["row"].str.startswith("this run"), "model"]) == {"mini-world"}
    assert set(table.loc[~table["row"].str.startswith("this run"), "model"]) == {"LLaMA-7B"}


def test_published_rows_are_the_facts():
    table = tables.results_table([], [], PUBLISHED, "mini")
    assert list(row_of(table, "report LoRA")[list(TASKS)]) == [63.5, 41.2, 74.7]
    assert list(row_of(table, "report DoRA")[list(TASKS)]) == [65.8, 51.2, 79.5]
    assert list(row_of(table, "paper DoRA")[list(TASKS)]) == [69.7, 87.2, 81.0]  # not 81.9, the report's slip
    assert list(row_of(table, "paper LoRA")[list(TASKS)]) == [68.9, 78.1, 78.8]


def test_a_published_row_that_is_not_there_is_an_error():
    with pytest.raises(LookupError, match="0 published rows"):
        tables.published_accuracy({"rows": []}, "Liu", "Table 1", "lora")


def test_own_cells_are_the_mean_and_interval_over_seeds():
    row = row_of(tables.results_table(RECORDS, [], PUBLISHED, "mini"), "this run DoRA")
    values = [r.result.accuracy for r in RECORDS if (r.spec.task, r.spec.method) == ("hellaswag", "dora")]
    expected = seed_interval([100 * value for value in values])
    assert row["hellaswag"] == pytest.approx(expected.estimate)
    assert row["hellaswag_half_width_pp"] == pytest.approx(expected.half_width)
    assert (row["hellaswag_seeds"], row["hellaswag_n"], row["hellaswag_chance_pct"]) == (3, 1800, 25.0)


def test_order_of_the_records_does_not_matter():
    forth = tables.results_table(RECORDS, FAILURES, PUBLISHED, "mini")
    back = tables.results_table(RECORDS[::-1], FAILURES[::-1], PUBLISHED, "mini")
    pd.testing.assert_frame_equal(forth, back)


def test_unparsed_answers_are_weighted_by_questions():
    records = [
        Record(Spec("boolq", "lora", 4, 0), Result(0.5, 100, 0.30, 0.5)),
        Record(Spec("boolq", "lora", 4, 1), Result(0.6, 300, 0.10, 0.5)),
    ]
    table = tables.results_table(records, [], PUBLISHED, "mini")
    assert row_of(table, "this run LoRA")["boolq_unparsed_pct"] == pytest.approx(15.0)
    assert "400 answers in 2 seeds, 15.0 % unparsed" not in tables.shown_table(table).to_string()  # 400 / 2 is whole
    assert "2 × 200" in tables.shown_table(table).to_string()


def test_failed_runs_are_failed_cells_neither_missing_nor_zero():
    records = [r for r in RECORDS if (r.spec.task, r.spec.method) != ("winogrande", "lora")]
    failures = FAILURES + [{"task": "winogrande", "method": "lora", "rank": 4, "seed": s, "error": "x"} for s in (0, 1)]
    table = tables.results_table(records, failures, PUBLISHED, "mini")
    assert math.isnan(row_of(table, "this run LoRA")["winogrande"])
    shown = tables.shown_table(table)
    assert row_of(shown, "this run LoRA")["WinoGrande"] == "failed (seeds 0, 1)"
    partly = row_of(shown, "this run DoRA")["BoolQ"]
    assert "3 × 600" in partly and partly.endswith("failed: seeds 3")
    full_without = row_of(shown, "this run full fine-tuning")
    assert "failed" not in "".join(full_without)


def test_what_was_not_run_says_so():
    records = [r for r in RECORDS if (r.spec.task, r.spec.method) != ("boolq", "full")]
    table = tables.results_table(records, [], PUBLISHED, "mini")
    shown = tables.shown_table(table)
    assert row_of(shown, "this run full fine-tuning")["BoolQ"] == "not run"


def test_one_seed_shows_no_interval():
    table = tables.results_table(make_records(seeds=1), [], PUBLISHED, "mini")
    assert "±" not in tables.shown_table(table).to_string()


def test_two_experiments_are_not_averaged_into_one_cell():
    twin = replace(RECORDS[0], result=replace(RECORDS[0].result, accuracy=0.1))
    with pytest.raises(ValueError, match="two records of LoRA, rank 4 on boolq, seed 0"):
        tables.results_table([*RECORDS, twin], [], PUBLISHED, "mini")


def test_validation_runs_are_not_in_the_table():
    sweep = [replace(r, spec=replace(r.spec, split="validation")) for r in RECORDS]
    pd.testing.assert_frame_equal(
        tables.results_table([*RECORDS, *sweep], [], PUBLISHED, "mini"),
        tables.results_table(RECORDS, [], PUBLISHED, "mini"),
    )


def test_ranks_are_rows_of_their_own():
    records = make_records((("lora", 2), ("lora", 16), ("dora-magnitude", None)))
    table = tables.results_table(records, [], PUBLISHED, "mini")
    assert list(table.loc[table["row"] == "this run LoRA", "rank"]) == [2, 16]
    assert list(table["row"])[-1] == "this run DoRA (m only)"


def test_written_table_sets_the_mini_world_apart_and_names_misquotations(tmp_path):
    table = tables.results_table(RECORDS, FAILURES, PUBLISHED, "mini")
    tables.write_results(table, tmp_path, PUBLISHED, notes=["A sentence of the chapter."])
    page = (tmp_path / "results.md").read_text()
    assert "not comparable" in page.split("| row |")[0]  # said before any number
    assert "HellaSwag 25.0" in page and "A sentence of the chapter." in page
    assert "BoolQ 67.5, HellaSwag 83.4, WinoGrande 80.4" in page and "WinoGrande 81.9" in page
    assert "Failed: this run DoRA on BoolQ, rank 4, seeds 3" in page
    for line in tables.shown_table(table).to_numpy():
        assert "| " + " | ".join(line) + " |" in page


def test_a_further_section_ends_the_page(tmp_path):
    rows = pd.DataFrame({"task": ["BoolQ"], "rate": ["a|b"], "points": ["+1.0"]})
    tables.write_results(
        tables.results_table(RECORDS, [], PUBLISHED, "mini"), tmp_path, sections={"More": ("Why.", rows)}
    )
    page = (tmp_path / "results.md").read_text()
    assert page.endswith(
        "\n## More\n\nWhy.\n\n| task | rate | points |\n| --- | --- | ---: |\n| BoolQ | a\\|b | +1.0 |\n"
    )


def test_written_csv_holds_the_same_numbers(tmp_path):
    table = tables.results_table(RECORDS, FAILURES, PUBLISHED, "mini")
    tables.write_results(table, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, (_, expected) in zip(rows, table.iterrows(), strict=True):
        assert row["row"] == expected["row"]
        assert [float(row[task]) for task in TASKS] == pytest.approx(list(expected[list(TASKS)]), abs=0.006)


def test_llama_records_are_not_called_mini_world(tmp_path):
    table = tables.results_table(make_records(base_model="yahma/llama-7b-hf"), [], PUBLISHED, "llama-7b")
    tables.write_results(table, tmp_path)
    assert "not comparable" not in (tmp_path / "results.md").read_text()


def test_without_any_run_the_page_says_so(tmp_path):
    tables.write_results(tables.results_table([], [], PUBLISHED, "mini"), tmp_path)
    assert "No run of this profile is finished" in (tmp_path / "results.md").read_text()


# --- differences and comparisons


def _answers(*right):
    return {f"q{i}": bool(value) for i, value in enumerate(right)}


def test_the_difference_is_paired_and_worded_by_its_interval():
    mostly, half = _answers(*[1] * 60), _answers(*[1, 0] * 30)
    answers = {("boolq", "dora"): {s: mostly for s in range(3)}, ("boolq", "lora"): {s: half for s in range(4)}}
    answers |= {("winogrande", "dora"): {0: half}, ("winogrande", "lora"): {0: half}, ("hellaswag", "dora"): {0: half}}
    boolq, winogrande = tables.difference_notes(answers)
    assert "BoolQ: +50.0 points" in boolq and "3 seeds, 60 questions" in boolq and boolq.endswith("DoRA is ahead.")
    assert "WinoGrande: +0.0 points" in winogrande and winogrande.endswith("no difference shown.")
    assert "two runs, not of two methods" in winogrande


def test_live_runs_are_set_beside_recorded_ones_of_the_same_cell():
    live = make_records((("lora", 4), ("dora", 8)), seeds=2)
    lines = tables.compared_with_recorded(live, RECORDS)
    assert len(lines) == 3  # DoRA of another rank is another experiment
    for line, task in zip(lines, TASKS, strict=True):
        ours = [100 * r.result.accuracy for r in live if (r.spec.task, r.spec.method) == (task, "lora")]
        theirs = [100 * r.result.accuracy for r in RECORDS if (r.spec.task, r.spec.method) == (task, "lora")]
        mean = sum(ours) / 2
        assert f"live {mean:.1f} (2 seeds)" in line and f"from {min(theirs):.1f} to {max(theirs):.1f}" in line
        assert ("inside" in line) == (min(theirs) <= mean <= max(theirs))
        equal = sum(a == b for a, b in zip(ours, theirs, strict=False))
        assert f"{equal} of 2 common seeds equal" in line
