"""Figures of comparisons: intervals of differences, what became of every answer, and a sweep of learning rates."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dora_lab.figures import METHOD_COLOURS, STYLE
from dora_lab.statistics import Interval, wording
from dora_lab.tables import METHOD_NAMES, TASK_NAMES

_MARKERS = {"lora": "o", "dora": "s", "full": "^", "dora-magnitude": "D"}
_OUTCOMES = {"right": ("#009E73", ""), "wrong": ("#E69F00", "//"), "unread": ("#999999", "xx")}


def difference_lines(differences: Mapping[str, Interval], title: str) -> Figure:
    """A line for every difference: estimate and 95 % limits in percentage points; filled where they leave out 0."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.38 * len(differences)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, found in enumerate(differences.values()):
            estimate, low, high = (100 * value for value in (found.estimate, found.low, found.high))
            face = "white" if wording(found).startswith("no") else METHOD_COLOURS["dora"]
            axes.plot([low, high], [place, place], color=METHOD_COLOURS["dora"], lw=1.6)
            axes.plot(estimate, place, "s", mfc=face, mec=METHOD_COLOURS["dora"], ms=7)
            axes.annotate(
                f"{estimate:+.1f}", (estimate, place), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        axes.axvline(0, color="black", lw=0.8, ls="--")
        axes.set_yticks(range(len(differences)), list(differences))
        axes.set_ylim(len(differences) - 0.4, -0.7)
        axes.set(xlabel="percentage points, 95 % limits", title=title)
    return figure


def difference_lines_alt(differences: Mapping[str, Interval], title: str) -> str:
    """Alt text of `difference_lines`: every estimate, its limits, and what they let one say."""
    parts = [
        f"{name} {100 * one.estimate:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f}), {wording(one)}"
        for name, one in differences.items()
    ]
    return f"{title}, percentage points with 95 % limits: {'; '.join(parts)}."


def outcome_bars(counts: Mapping[str, Mapping[str, int]], title: str) -> Figure:
    """A bar for every row of `counts`: answers that are right, wrong, and unread, in percent of the questions."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.1 + 0.42 * len(counts)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        left = np.zeros(len(counts))
        for kind, (colour, hatch) in _OUTCOMES.items():
            values = np.array([100 * row[kind] / sum(row.values()) for row in counts.values()])
            axes.barh(range(len(counts)), values, 0.65, left, color=colour, ec="black", lw=0.5, hatch=hatch, label=kind)
            for place, (value, start) in enumerate(zip(values, left, strict=True)):
                if value > 3:
                    box = {"fc": "white", "ec": "none", "pad": 1, "alpha": 0.85}
                    text = f"{value:.1f}"
                    axes.text(start + value / 2, place, text, ha="center", va="center", fontsize=8, bbox=box)
            left += values
        axes.set_yticks(range(len(counts)), list(counts))
        axes.set(xlim=(0, 100), xlabel="questions (%)", title=title)
        axes.invert_yaxis()
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def outcome_bars_alt(counts: Mapping[str, Mapping[str, int]], title: str) -> str:
    """Alt text of `outcome_bars`: every count."""
    parts = [f"{name}: " + ", ".join(f"{row[kind]} {kind}" for kind in _OUTCOMES) for name, row in counts.items()]
    return f"{title}. {'; '.join(parts)}."


def sweep_lines(rows: Iterable[Mapping]) -> Figure:
    """Validation accuracy against the learning rate, a panel for each task: a dot a seed, a line through the means.

    The best mean of each method is ringed. A rate at which a run failed has a cross on the axis instead of a mean.
    """
    scores = _scores(rows)
    tasks = [task for task in TASK_NAMES if any(key[0] == task for key in scores)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for method in _methods(scores, task):
                colour, marker, own = METHOD_COLOURS[method], _MARKERS[method], scores[task, method]
                means = {rate: _mean(values) for rate, values in own.items()}
                axes.plot(
                    list(means), list(means.values()), color=colour, marker=marker, ms=5, label=METHOD_NAMES[method]
                )
                for rate, values in own.items():
                    found = [100 * value for value in values if value is not None]
                    axes.plot([rate] * len(found), found, ".", color=colour, ms=4)
                    if len(found) < len(values):
                        axes.plot(rate, 1.5, "x", color=colour, ms=6, clip_on=False)
                best = _best(own)
                if best is not None:
                    axes.plot(best, means[best], "o", mfc="none", mec=colour, ms=11, mew=1.3)
            rates = sorted({rate for (name, _), own in scores.items() if name == task for rate in own})
            axes.set_xscale("log")
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.minorticks_off()
            axes.set(title=TASK_NAMES[task], xlabel="learning rate", ylim=(0, 103))
        panels[0].set_ylabel("validation accuracy (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def sweep_lines_alt(rows: Iterable[Mapping]) -> str:
    """Alt text of `sweep_lines`: for each task and method the best rate and its mean, and the number of rates."""
    scores, parts = _scores(rows), []
    for task in (name for name in TASK_NAMES if any(key[0] == name for key in scores)):
        for method in _methods(scores, task):
            own = scores[task, method]
            best = _best(own)
            said = "every rate failed" if best is None else f"best {_mean(own[best]):.1f} % at {best:g}"
            parts.append(f"{TASK_NAMES[task]}, {METHOD_NAMES[method]}: {said}, {len(own)} rates")
    return f"Validation accuracy against the learning rate. {'; '.join(parts)}."


def _scores(rows: Iterable[Mapping]) -> dict[tuple[str, str], dict[float, list[float | None]]]:
    scores: dict = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["learning_rate"]):
        scores[row["task"], row["method"]][row["learning_rate"]].append(row["accuracy"])
    return scores


def _methods(scores: Mapping, task: str) -> list[str]:
    return [method for method in METHOD_NAMES if (task, method) in scores]


def _mean(values: Sequence[float | None]) -> float:
    return math.nan if None in values else 100 * sum(values) / len(values)


def _best(own: Mapping[float, Sequence[float | None]]) -> float | None:
    means = {rate: _mean(values) for rate, values in own.items() if None not in values}
    return min(means, key=lambda rate: (-means[rate], rate)) if means else None
