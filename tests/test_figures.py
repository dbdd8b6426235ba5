"""Table and figures: what they say is what the records say, alt text included; files repeat byte for byte."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dora_lab import figures, tables
from dora_lab.statistics import seed_interval

PUBLISHED = tables.read_published()
TASKS = {"boolq": 0.5, "hellaswag": 0.25, "winogrande": 0.5}


@dataclass(frozen=True)
class Spec:
    task: str
    method: str
    rank: int | None
    seed: int
    base_model: str = "mini-world"
    split: str = "test"

    @property
    def run_id(self):
        return f"{self.task}-{self.method}-r{self.rank}-s{self.seed}"


@dataclass(frozen=True)
class Result:
    accuracy: float
    n: int
    unparsed_rate: float
    chance: float


@dataclass(frozen=True)
class Record:
    spec: Spec
    result: Result


def make_records(methods=(("lora", 4), ("dora", 4), ("full", None)), seeds=3, base_model="mini-world"):
    generator = np.random.default_rng(0)
    level = {"lora": 0.74, "dora": 0.76, "full": 0.93, "dora-magnitude": 0.6}
    records = []
    for task, chance in TASKS.items():
        for method, rank in methods:
            for seed in range(seeds):
                accuracy = round(float(np.clip(generator.normal(level[method], 0.02), 0, 1)) * 600) / 600
                spec = Spec(task, method, rank, seed, base_model)
                records.append(Record(spec, Result(accuracy, 600, 0.0, chance)))
    return records


def make_geometry(methods=("full", "lora", "dora"), seeds=2):
    generator, sign = np.random.default_rng(1), {"full": -1, "lora": 1, "dora": -1, "dora-magnitude": 1}
    rows = []
    for method in methods:
        for seed in range(seeds):
            for step in (30, 60, 90, 120):
                for layer in range(6):
                    for module in ("q_proj", "v_proj"):
                        x = step / 120 * (1 + 0.2 * layer) * 1e-3
                        y = (0.01 + 4 * sign[method] * x) * (1 + 0.1 * generator.normal())
                        row = {"method": method, "seed": seed, "step": step, "layer": layer, "module": module}
                        rows.append(row | {"delta_magnitude": y, "delta_direction": x})
    return rows


RECORDS = make_records()
FAILURES = [{"task": "boolq", "method": "dora", "rank": 4, "seed": 3, "error": "OSError: No space left on device"}]


def row_of(table, name):
    return table[table["row"] == name].iloc[0]


# --- the table


def test_rows_and_columns_are_the_reports_figure_2():
    table = figures.results_table(RECORDS, [], PUBLISHED, "mini")
    names = ["paper LoRA", "report LoRA", "this run LoRA", "paper DoRA", "report DoRA", "this run DoRA"]
    assert list(table["row"]) == [*names, "this run full fine-tuning"]
    assert list(figures.shown_table(table)) == ["row", "model", "rank", "BoolQ", "HellaSwag", "WinoGrande"]
    assert set(table.loc[table["row"].str.startswith("this run"), "model"]) == {"mini-world"}
    assert set(table.loc[~table["row"].str.startswith("this run"), "model"]) == {"LLaMA-7B"}


def test_published_rows_are_the_facts():
    table = figures.results_table([], [], PUBLISHED, "mini")
    assert list(row_of(table, "report LoRA")[list(TASKS)]) == [63.5, 41.2, 74.7]
    assert list(row_of(table, "report DoRA")[list(TASKS)]) == [65.8, 51.2, 79.5]
    assert list(row_of(table, "paper DoRA")[list(TASKS)]) == [69.7, 87.2, 81.0]  # not 81.9, the report's slip
    assert list(row_of(table, "paper LoRA")[list(TASKS)]) == [68.9, 78.1, 78.8]


def test_a_published_row_that_is_not_there_is_an_error():
    with pytest.raises(LookupError, match="0 published rows"):
        tables.published_accuracy({"rows": []}, "Liu", "Table 1", "lora")


def test_own_cells_are_the_mean_and_interval_over_seeds():
    row = row_of(figures.results_table(RECORDS, [], PUBLISHED, "mini"), "this run DoRA")
    values = [r.result.accuracy for r in RECORDS if (r.spec.task, r.spec.method) == ("hellaswag", "dora")]
    expected = seed_interval([100 * value for value in values])
    assert row["hellaswag"] == pytest.approx(expected.estimate)
    assert row["hellaswag_half_width_pp"] == pytest.approx(expected.half_width)
    assert (row["hellaswag_seeds"], row["hellaswag_n"], row["hellaswag_chance_pct"]) == (3, 1800, 25.0)


def test_order_of_the_records_does_not_matter():
    forth = figures.results_table(RECORDS, FAILURES, PUBLISHED, "mini")
    back = figures.results_table(RECORDS[::-1], FAILURES[::-1], PUBLISHED, "mini")
    pd.testing.assert_frame_equal(forth, back)


def test_unparsed_answers_are_weighted_by_questions():
    records = [
        Record(Spec("boolq", "lora", 4, 0), Result(0.5, 100, 0.30, 0.5)),
        Record(Spec("boolq", "lora", 4, 1), Result(0.6, 300, 0.10, 0.5)),
    ]
    table = figures.results_table(records, [], PUBLISHED, "mini")
    assert row_of(table, "this run LoRA")["boolq_unparsed_pct"] == pytest.approx(15.0)
    assert "400 answers in 2 seeds, 15.0 % unparsed" not in figures.shown_table(table).to_string()  # 400 / 2 is whole
    assert "2 × 200" in figures.shown_table(table).to_string()


def test_failed_runs_are_failed_cells_neither_missing_nor_zero():
    records = [r for r in RECORDS if (r.spec.task, r.spec.method) != ("winogrande", "lora")]
    failures = FAILURES + [{"task": "winogrande", "method": "lora", "rank": 4, "seed": s, "error": "x"} for s in (0, 1)]
    table = figures.results_table(records, failures, PUBLISHED, "mini")
    assert math.isnan(row_of(table, "this run LoRA")["winogrande"])
    shown = figures.shown_table(table)
    assert row_of(shown, "this run LoRA")["WinoGrande"] == "failed (seeds 0, 1)"
    partly = row_of(shown, "this run DoRA")["BoolQ"]
    assert "3 × 600" in partly and partly.endswith("failed: seeds 3")
    full_without = row_of(shown, "this run full fine-tuning")
    assert "failed" not in "".join(full_without)


def test_what_was_not_run_says_so():
    records = [r for r in RECORDS if (r.spec.task, r.spec.method) != ("boolq", "full")]
    table = figures.results_table(records, [], PUBLISHED, "mini")
    shown = figures.shown_table(table)
    assert row_of(shown, "this run full fine-tuning")["BoolQ"] == "not run"


def test_one_seed_shows_no_interval():
    table = figures.results_table(make_records(seeds=1), [], PUBLISHED, "mini")
    assert "±" not in figures.shown_table(table).to_string()


def test_two_experiments_are_not_averaged_into_one_cell():
    twin = replace(RECORDS[0], result=replace(RECORDS[0].result, accuracy=0.1))
    with pytest.raises(ValueError, match="two records of LoRA, rank 4 on boolq, seed 0"):
        figures.results_table([*RECORDS, twin], [], PUBLISHED, "mini")


def test_validation_runs_are_not_in_the_table():
    sweep = [replace(r, spec=replace(r.spec, split="validation")) for r in RECORDS]
    pd.testing.assert_frame_equal(
        figures.results_table([*RECORDS, *sweep], [], PUBLISHED, "mini"),
        figures.results_table(RECORDS, [], PUBLISHED, "mini"),
    )


def test_ranks_are_rows_of_their_own():
    records = make_records((("lora", 2), ("lora", 16), ("dora-magnitude", None)))
    table = figures.results_table(records, [], PUBLISHED, "mini")
    assert list(table.loc[table["row"] == "this run LoRA", "rank"]) == [2, 16]
    assert list(table["row"])[-1] == "this run DoRA (m only)"


def test_written_table_sets_the_mini_world_apart_and_names_misquotations(tmp_path):
    table = figures.results_table(RECORDS, FAILURES, PUBLISHED, "mini")
    figures.write_results(table, tmp_path, PUBLISHED, notes=["A sentence of the chapter."])
    page = (tmp_path / "results.md").read_text()
    assert "not comparable" in page.split("| row |")[0]  # said before any number
    assert "HellaSwag 25.0" in page and "A sentence of the chapter." in page
    assert "BoolQ 67.5, HellaSwag 83.4, WinoGrande 80.4" in page and "WinoGrande 81.9" in page
    assert "Failed: this run DoRA on BoolQ, rank 4, seeds 3" in page
    for line in figures.shown_table(table).to_numpy():
        assert "| " + " | ".join(line) + " |" in page


def test_a_further_section_ends_the_page(tmp_path):
    rows = pd.DataFrame({"task": ["BoolQ"], "rate": ["a|b"], "points": ["+1.0"]})
    figures.write_results(
        figures.results_table(RECORDS, [], PUBLISHED, "mini"), tmp_path, sections={"More": ("Why.", rows)}
    )
    page = (tmp_path / "results.md").read_text()
    assert page.endswith(
        "\n## More\n\nWhy.\n\n| task | rate | points |\n| --- | --- | ---: |\n| BoolQ | a\\|b | +1.0 |\n"
    )


def test_written_csv_holds_the_same_numbers(tmp_path):
    table = figures.results_table(RECORDS, FAILURES, PUBLISHED, "mini")
    figures.write_results(table, tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, (_, expected) in zip(rows, table.iterrows(), strict=True):
        assert row["row"] == expected["row"]
        assert [float(row[task]) for task in TASKS] == pytest.approx(list(expected[list(TASKS)]), abs=0.006)


def test_llama_records_are_not_called_mini_world(tmp_path):
    table = figures.results_table(make_records(base_model="yahma/llama-7b-hf"), [], PUBLISHED, "llama-7b")
    figures.write_results(table, tmp_path)
    assert "not comparable" not in (tmp_path / "results.md").read_text()


def test_without_any_run_the_page_says_so(tmp_path):
    figures.write_results(figures.results_table([], [], PUBLISHED, "mini"), tmp_path)
    assert "No run of this profile is finished" in (tmp_path / "results.md").read_text()


# --- bars


def bar_heights(axis):
    return sorted(round(patch.get_height(), 6) for patch in axis.patches)


def test_bars_are_as_high_as_the_table_says_and_worlds_are_apart():
    figure = figures.results_bars(RECORDS, PUBLISHED)
    left, right = figure.axes
    table = figures.results_table(RECORDS, [], PUBLISHED, "mini")
    own = table["row"].str.startswith("this run")
    assert bar_heights(left) == sorted(table[~own][list(TASKS)].to_numpy().ravel().round(6))
    assert bar_heights(right) == sorted(table[own][list(TASKS)].to_numpy().astype(float).ravel().round(6))
    assert "LLaMA-7B" in left.get_title() and "mini-world" in right.get_title()


def test_bars_say_failed_and_not_run():
    records = [r for r in RECORDS if r.spec.task != "boolq"]
    failures = [{"task": "boolq", "method": "lora", "rank": 4, "seed": 0, "error": "x"}]
    figure = figures.results_bars(records, PUBLISHED, failures)
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert texts.count("failed") == 1 and texts.count("not run") == 2


def test_bars_without_records_still_draw_the_published_rows():
    figure = figures.results_bars([], PUBLISHED)
    assert len(figure.axes[0].patches) == 12 and not figure.axes[1].patches


def test_bars_alt_names_every_value():
    alt = figures.results_bars_alt(RECORDS, PUBLISHED, FAILURES)
    table = figures.results_table(RECORDS, FAILURES, PUBLISHED, "mini")
    for value in table[list(TASKS)].to_numpy().ravel():
        assert f"{value:.1f}" in alt
    assert "not comparable" in alt and "failed: seeds 3" in alt and "nan" not in alt


def test_series_differ_by_more_than_colour():
    methods = (("lora", 2), ("lora", 4), ("lora", 16), ("dora", 4), ("full", None), ("dora-magnitude", None))
    figure = figures.results_bars(make_records(methods), PUBLISHED)
    for axis, count in zip(figure.axes, (4, 6), strict=True):
        assert len({patch.get_hatch() for patch in axis.get_legend().get_patches()}) == count


# --- update geometry


def test_correlations_are_numpys_per_seed_then_averaged():
    rows = make_geometry()
    table = figures.geometry_correlations(rows).set_index(["method", "module"])
    per_seed = []
    for seed in (0, 1):
        mine = [r for r in rows if r["method"] == "lora" and r["module"] == "q_proj" and r["seed"] == seed]
        x, y = ([r[key] for r in mine] for key in ("delta_direction", "delta_magnitude"))
        per_seed.append(np.corrcoef(x, y)[0, 1])
    assert table.loc[("lora", "q_proj"), "correlation"] == pytest.approx(np.tanh(np.mean(np.arctanh(per_seed))))
    assert table.loc[("lora", "q_proj"), ["seeds", "points"]].tolist() == [2, 24]
    assert table.loc[("lora", "both"), "points"] == 48
    assert table.loc[("full", "both"), "correlation"] < 0 < table.loc[("lora", "both"), "correlation"]
    assert table.loc[("dora", "q_proj"), "paper_vl_bart"] == -0.31
    assert math.isnan(table.loc[("dora", "v_proj"), "paper_vl_bart"])
    assert table[["low", "correlation", "high"]].abs().le(1).all(axis=None)


def test_a_magnitude_that_does_not_change_has_no_correlation():
    rows = [row | {"delta_magnitude": 0.0} for row in make_geometry(("lora",))]
    table = figures.geometry_correlations(rows)
    assert table["correlation"].isna().all() and (table["seeds"] == 0).all()
    assert "no correlation defined" in figures.geometry_scatter_alt(rows)
    assert len(figures.geometry_scatter(rows).axes) == 1


def test_scatter_has_a_panel_a_method_and_a_point_a_place():
    rows = make_geometry()
    figure = figures.geometry_scatter(rows)
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == ["full fine-tuning", "LoRA", "DoRA"]
    for axis, method in zip(figure.axes, ("full", "lora", "dora"), strict=True):
        drawn = sorted(float(points.get_offsets()[0, 1]) for points in axis.collections)
        frame = pd.DataFrame([row for row in rows if row["method"] == method])
        expected = frame.groupby(["layer", "module", "step"])["delta_magnitude"].mean()
        assert drawn == pytest.approx(sorted(expected))
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    layers, steps = {f"layer {i}" for i in range(6)}, {f"step {s}" for s in (30, 60, 90, 120)}
    assert labels == layers | steps | {"query (filled)", "value (open)"}


def test_scatter_alt_has_each_correlation():
    rows = make_geometry()
    alt = figures.geometry_scatter_alt(rows)
    for _, row in figures.geometry_correlations(rows).iterrows():
        assert f"{row['correlation']:+.2f}" in alt
    assert "6 layers and 4 checkpoints" in alt


@pytest.mark.parametrize("rows", [[], [{"method": "lora", "seed": 0}]])
def test_geometry_rows_that_lack_something_are_named(rows):
    with pytest.raises(ValueError, match="delta_direction"):
        figures.geometry_scatter(rows)


def test_geometry_of_two_tasks_is_refused():
    rows = make_geometry(("lora",))
    mixed = [row | {"task": task} for task in ("boolq", "hellaswag") for row in rows]
    with pytest.raises(ValueError, match="boolq, hellaswag"):
        figures.geometry_correlations(mixed)


# --- showing and saving

SAVE = """
import sys; sys.path.insert(0, {tests!r})
from test_figures import *
figures.save_figure(figures.results_bars(RECORDS, PUBLISHED), sys.argv[1], "results")
figures.save_figure(figures.geometry_scatter(make_geometry()), sys.argv[1], "geometry")
"""


def test_saved_files_repeat_byte_for_byte_in_another_process(tmp_path):
    code = SAVE.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    figures.save_figure(figures.results_bars(RECORDS, PUBLISHED), tmp_path / "own", "results")
    figures.save_figure(figures.geometry_scatter(make_geometry()), tmp_path / "own", "geometry")
    names = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert names == ["geometry.png", "geometry.svg", "results.png", "results.svg"]
    for name in names:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_show_puts_the_alt_text_where_a_notebook_keeps_it(monkeypatch):
    seen = []
    monkeypatch.setattr("IPython.display.display", lambda data, **options: seen.append((data, options)))
    figures.show(figures.results_bars(RECORDS, PUBLISHED), "what it shows")
    ((data, options),) = seen
    assert options == {"metadata": {"image/png": {"alt": "what it shows"}}, "raw": True}
    assert data["text/plain"] == "what it shows" and data["image/png"].startswith("iVBORw0KGgo")
    json.dumps(data)


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
