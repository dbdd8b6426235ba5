"""The figures of memory plans: what is drawn is what was planned, and the alt text says it."""

import pytest

from dora_lab import memory_figures as figures
from dora_lab.memory import PARTS, longest, plan
from dora_lab.shapes import SHAPES

LLAMA_7B = SHAPES["llama-7b"]
PLANS = {
    "DoRA": plan(LLAMA_7B),
    "QDoRA": plan(LLAMA_7B, base_precision="nf4"),
    "full": plan(LLAMA_7B, method="full", checkpointing=False),
}
CURVES = {
    name: {length: plan(LLAMA_7B, method="lora", length=length, checkpointing=on) for length in (64, 256, 1024)}
    for name, on in (("with", True), ("without", False))
}


def test_the_bars_are_the_plans_parts():
    figure = figures.memory_bars(PLANS)
    (axes,) = figure.axes
    drawn = sum(bar.get_width() for bar in axes.patches)
    assert drawn == pytest.approx(sum(found.total for found in PLANS.values()) / 1e9, rel=0.005)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(PLANS)
    texts = [text.get_text() for text in axes.texts]
    assert {"19.6", "10.3", "16 GB", "80 GB"} <= set(texts) and axes.get_xlabel()
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in axes.patches}
    assert len(looks) == len({colour for colour, _ in looks})  # a colour is a part


def test_every_part_has_a_look_of_its_own():
    assert set(figures.PART_LOOKS) == set(PARTS)
    assert len({colour for colour, _ in figures.PART_LOOKS.values()}) == len(PARTS)


def test_the_alt_text_of_the_bars_has_every_total_and_where_it_fits():
    alt = figures.memory_bars_alt(PLANS)
    assert "DoRA: 19.6 GB (weights 13.5" in alt and "fits on 24, 40, 80 GB" in alt
    assert "QDoRA: 10.3 GB" in alt and "full: " in alt and "fits on none" in alt


def test_lines_over_the_length_and_their_alt_text():
    figure = figures.length_lines(CURVES, 40)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in lines] == [
        [found.total / 1e9 for found in plans.values()] for plans in CURVES.values()
    ]
    assert len({line.get_marker() for line in lines}) == 2
    alt = figures.length_lines_alt(CURVES, 40)
    assert "with: " in alt and "fits on 40 GB up to 1024 tokens" in alt and "fits on 40 GB up to 64 tokens" in alt
    assert 64 < longest(LLAMA_7B, 40, method="lora", checkpointing=False) < 256


def test_no_plan_is_no_figure():
    with pytest.raises(ValueError, match="at least one plan"):
        figures.memory_bars({})
