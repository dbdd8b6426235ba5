"""The bars and what is saved: heights are the table's, alt text included; files repeat byte for byte."""

import json
import subprocess
import sys
from pathlib import Path

from made_records import FAILURES, PUBLISHED, RECORDS, TASKS, make_geometry, make_records

from dora_lab import figures, tables
from dora_lab.geometry_figures import geometry_scatter


def bar_heights(axis):
    return sorted(round(patch.get_height(), 6) for patch in axis.patches)


def test_bars_are_as_high_as_the_table_says_and_worlds_are_apart():
    figure = figures.results_bars(RECORDS, PUBLISHED)
    left, right = figure.axes
    table = tables.results_table(RECORDS, [], PUBLISHED, "mini")
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
    table = tables.results_table(RECORDS, FAILURES, PUBLISHED, "mini")
    for value in table[list(TASKS)].to_numpy().ravel():
        assert f"{value:.1f}" in alt
    assert "not comparable" in alt and "failed: seeds 3" in alt and "nan" not in alt


def test_series_differ_by_more_than_colour():
    methods = (("lora", 2), ("lora", 4), ("lora", 16), ("dora", 4), ("full", None), ("dora-magnitude", None))
    figure = figures.results_bars(make_records(methods), PUBLISHED)
    for axis, count in zip(figure.axes, (4, 6), strict=True):
        assert len({patch.get_hatch() for patch in axis.get_legend().get_patches()}) == count


# --- showing and saving

SAVE = """
import sys; sys.path.insert(0, {tests!r})
from made_records import *
from dora_lab import figures
from dora_lab.geometry_figures import geometry_scatter
figures.save_figure(figures.results_bars(RECORDS, PUBLISHED), sys.argv[1], "results")
figures.save_figure(geometry_scatter(make_geometry()), sys.argv[1], "geometry")
"""


def test_saved_files_repeat_byte_for_byte_in_another_process(tmp_path):
    code = SAVE.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    figures.save_figure(figures.results_bars(RECORDS, PUBLISHED), tmp_path / "own", "results")
    figures.save_figure(geometry_scatter(make_geometry()), tmp_path / "own", "geometry")
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
