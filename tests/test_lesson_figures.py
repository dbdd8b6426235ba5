"""The figures of chapters 01 to 03: what is drawn is what was given, and the alt text says it."""

import math

import numpy as np
import pytest

from dora_lab import lesson_figures as figures
from dora_lab.geometry_figures import geometry_correlations

ERRORS, BOUNDS = {2: [1.0, 0.6, 0.4321], 10: [1.0, 0.3, 0.2345]}, {2: 0.4111, 10: 0.2222}
CURVES = {"decaying": [1.0, 0.5, 0.25, 0.125, 0.0], "flat": [1.0, 0.9, 0.7, 0.5, 0.0]}
KEPT = {"LoRA": 3 * 2**20, "DoRA, naive": 7 * 2**20 + 2**19}


def toy_rows():
    draws = np.random.default_rng(0)
    return [
        {
            "method": method, "seed": seed, "step": step, "layer": layer, "module": "toy",
            "delta_magnitude": draws.random(), "delta_direction": draws.random(),
        }
        for method in ("full", "lora", "dora") for seed in (0, 1) for step in (5, 9) for layer in range(4)
    ]  # fmt: skip


ROWS = toy_rows()
CASES = {
    "fit_curves": (ERRORS, BOUNDS),
    "rank_bounds": (CURVES, 1),
    "vector_change": ([3.0, 0.0], [0.0, 2.0]),
    "toy_geometry": (ROWS, ROWS[:6]),
    "saved_bytes": (KEPT,),
}


@pytest.mark.parametrize("name", CASES)
def test_every_figure_has_alt_text_and_labelled_axes(name):
    figure = getattr(figures, name)(*CASES[name])
    alt = getattr(figures, f"{name}_alt")(*CASES[name])
    assert len(alt) > 60 and alt.endswith(".")
    assert all(axis.get_xlabel() for axis in figure.axes)
    figure.canvas.draw()


def test_no_figure_of_the_module_is_without_alt_text():
    drawn = {name for name, value in vars(figures).items() if getattr(value, "__module__", "") == figures.__name__}
    drawn = {name for name in drawn if not name.startswith("_") and not name.endswith("_alt")}
    assert drawn == CASES.keys()
    assert all(hasattr(figures, f"{name}_alt") for name in drawn)


def test_curves_and_bounds_are_drawn_and_told():
    axis = figures.fit_curves(ERRORS, BOUNDS).axes[0]
    assert [list(line.get_ydata()) for line in axis.lines[::2]] == list(ERRORS.values())
    alt = figures.fit_curves_alt(ERRORS, BOUNDS)
    assert all(number in alt for number in ("0.4321", "0.4111", "0.2345", "0.2222"))
    alt = figures.rank_bounds_alt(CURVES, 1)
    assert "decaying: 0.500 at rank 1, 0.250 at rank 2" in alt and "flat: 0.900 at rank 1" in alt


def test_a_right_angle_is_told_as_one():
    alt = figures.vector_change_alt([3.0, 0.0], [0.0, 2.0])
    assert "magnitude 3.00" in alt and "magnitude 2.00" in alt and "90.0 degrees" in alt and "cosine is 1.000" in alt


def test_the_toys_correlations_are_told():
    alt = figures.toy_geometry_alt(ROWS, ROWS[:6])
    table = geometry_correlations(ROWS).query("module == 'both'")
    for value in table["correlation"]:
        assert f"r = {value:+.2f}" in alt
    titles = [axis.get_title() for axis in figures.toy_geometry(ROWS, ROWS[:6]).axes]
    assert all(f"{value:+.2f}" in title for value, title in zip(table["correlation"], titles, strict=True))
    assert math.isfinite(table["correlation"].sum())


def test_bars_are_as_long_as_the_bytes():
    axis = figures.saved_bytes(KEPT).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [3.0, 7.5]
    assert "LoRA 3.00 MiB" in figures.saved_bytes_alt(KEPT) and "naive 7.50 MiB" in figures.saved_bytes_alt(KEPT)
