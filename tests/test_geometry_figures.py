"""The report's Figure 1: correlations are numpy's, every point is drawn, the alt text says the same."""

import math

import numpy as np
import pandas as pd
import pytest
from made_records import make_geometry

from dora_lab.geometry_figures import geometry_correlations, geometry_scatter, geometry_scatter_alt


def test_correlations_are_numpys_per_seed_then_averaged():
    rows = make_geometry()
    table = geometry_correlations(rows).set_index(["method", "module"])
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
    table = geometry_correlations(rows)
    assert table["correlation"].isna().all() and (table["seeds"] == 0).all()
    assert "no correlation defined" in geometry_scatter_alt(rows)
    assert len(geometry_scatter(rows).axes) == 1


def test_scatter_has_a_panel_a_method_and_a_point_a_place():
    rows = make_geometry()
    figure = geometry_scatter(rows)
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
    alt = geometry_scatter_alt(rows)
    for _, row in geometry_correlations(rows).iterrows():
        assert f"{row['correlation']:+.2f}" in alt
    assert "6 layers and 4 checkpoints" in alt


@pytest.mark.parametrize("rows", [[], [{"method": "lora", "seed": 0}]])
def test_geometry_rows_that_lack_something_are_named(rows):
    with pytest.raises(ValueError, match="delta_direction"):
        geometry_scatter(rows)


def test_geometry_of_two_tasks_is_refused():
    rows = make_geometry(("lora",))
    mixed = [row | {"task": task} for task in ("boolq", "hellaswag") for row in rows]
    with pytest.raises(ValueError, match="boolq, hellaswag"):
        geometry_correlations(mixed)
