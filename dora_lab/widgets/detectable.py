"""The difference calculator: what a test of n questions can and cannot show about two models."""

import math
from dataclasses import dataclass

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from dora_lab.power import mcnemar_power, smallest_detectable_difference
from dora_lab.widgets.panel import Drawing, Panel, canvas, slider

CURVE, CHOSEN, SMALLEST = "#0072B2", "#D55E00", "#000000"
QUESTIONS = (50, 100, 200, 500, 1000, 1267, 2000, 3270, 5000, 10042, 20000)  # 1267, 3270, 10042: the real test splits


@dataclass(frozen=True)
class Detectable:
    """Power against the difference, in percentage points; `smallest_pp` is NaN where none has a power of 80 %."""

    questions: int
    discordant: float
    difference_pp: float
    power: float
    smallest_pp: float
    curve_pp: np.ndarray
    curve_power: np.ndarray


def detectable(questions: int, discordant: float, difference_pp: float, points: int = 20) -> Detectable:
    """All that the panel shows. A difference above the discordant share is cut to it, the largest there can be."""
    difference = min(difference_pp / 100, discordant)
    smallest = smallest_detectable_difference(questions, discordant)
    reach = 1.6 * max(difference, 0.0 if math.isnan(smallest) else smallest)
    curve = np.linspace(0, min(discordant, max(reach, 0.01)), points)
    power = mcnemar_power(questions, discordant, curve)
    chosen = mcnemar_power(questions, discordant, difference)
    return Detectable(questions, discordant, 100 * difference, chosen, 100 * smallest, 100 * curve, power)


def detectable_figure(found: Detectable) -> Figure:
    """Power of the test against the difference, with the chosen and the smallest detectable difference."""
    figure, (axes,) = canvas(6.4, 3.3)
    axes.plot(found.curve_pp, found.curve_power, color=CURVE, lw=2)
    axes.axhline(0.8, color="0.6", ls=":", lw=1)
    axes.plot(found.difference_pp, found.power, "o", color=CHOSEN, ms=9, label=_chosen(found))
    if math.isnan(found.smallest_pp):
        axes.plot([], [], " ", label="no difference is found with 80 %")
    else:
        label = f"smallest found with 80 %: {found.smallest_pp:.2f} points"
        axes.plot(found.smallest_pp, 0.8, "D", color=SMALLEST, ms=7, label=label)
    axes.set(xlabel="true difference of accuracies (percentage points)", ylabel="power of McNemar's test")
    axes.set(ylim=(0, 1.03), xlim=(0, None))
    axes.set_title(f"{found.questions:,} questions, {100 * found.discordant:.0f} % answered right by one model only")
    axes.legend(frameon=False, loc="best")
    figure.subplots_adjust(left=0.1, right=0.98, top=0.91, bottom=0.15)
    return figure


def detectable_alt(found: Detectable) -> str:
    """Alt text of `detectable_figure`."""
    if math.isnan(found.smallest_pp):
        smallest = "no possible difference is found with 80 %"
    else:
        smallest = f"the smallest difference found with 80 % is {found.smallest_pp:.2f} points"
    return (
        f"Power of the exact McNemar test at 5 % against the difference of two accuracies: with {found.questions:,} "
        f"questions of which {100 * found.discordant:.0f} % are discordant, {_chosen(found)}; {smallest}."
    )


def difference_calculator(questions: int = 1000, discordant: float = 0.1, difference_pp: float = 1.0) -> Panel:
    """Panel: number of questions, discordant share and difference → power, and the smallest detectable difference."""
    controls = {
        "questions": slider(
            ipywidgets.SelectionSlider,
            "questions n",
            "Questions that both models answer",
            value=questions,
            options=sorted({*QUESTIONS, questions}),
        ),
        "discordant": slider(
            ipywidgets.FloatSlider,
            "discordant share q",
            "Share of the questions that exactly one of the two models answers right",
            value=discordant,
            min=0.01,
            max=0.6,
            step=0.01,
        ),
        "difference_pp": slider(
            ipywidgets.FloatSlider,
            "difference (points)",
            "True difference of the two accuracies, in percentage points; at most the discordant share",
            value=difference_pp,
            min=0.1,
            max=20,
            step=0.1,
            readout_format=".1f",
        ),
    }

    def draw(questions: int, discordant: float, difference_pp: float) -> Drawing:
        found = detectable(questions, discordant, difference_pp)
        return Drawing(detectable_figure(found), detectable_alt(found))

    return Panel(controls, draw)


def _chosen(found: Detectable) -> str:
    return f"{found.difference_pp:.1f} points are found with {100 * found.power:.0f} %"
