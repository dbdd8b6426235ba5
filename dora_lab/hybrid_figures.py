"""Figures of chapter 14: what each part of each module promises, and accuracy for what was trained."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dora_lab.adapter_config import layer_of
from dora_lab.figures import METHOD_COLOURS, STYLE, drawn_limits
from dora_lab.hybrid_tables import Point
from dora_lab.hybrids import MAGNITUDE, METHOD_OF, UPDATE, Part
from dora_lab.tables import METHOD_NAMES, TASK_NAMES

_MARKERS = {"lora": "o", "dora": "s", "dora-magnitude": "D"}
_VARIANT_LOOKS = [(c, m) for m, c in zip("^vP*X<>p", ("#009E73", "#D55E00", "#56B4E9", "#000000") * 2, strict=True)]
_SIDEWAYS = 0.025  # of its place, for each variant another multiple, so that runs of one price do not hide each other
_PANELS = {UPDATE: "low-rank update (A and B)", MAGNITUDE: "magnitude m"}


def worth_maps(parts: Sequence[Part], methods: Mapping[str, str]) -> Figure:
    """Layer × module, a panel for updates and one for magnitudes: share of all gain, in percent, per 1000 parameters.

    A frame marks what `methods`, of `hybrids.choose_methods`, has taken.
    """
    values = _worths(parts)
    kinds, layers = _axes(parts)
    largest = max(values.values())
    taken = {method: kinds for kinds, method in METHOD_OF.items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.45 * len(layers) + 1.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2)
        for axis, (what, title) in zip(axes, _PANELS.items(), strict=True):
            grid = np.full((len(layers), len(kinds)), np.nan)
            for part in parts:
                if part.kind == what:
                    row, column = layers.index(layer_of(part.module)), kinds.index(part.module.rpartition(".")[2])
                    value = grid[row, column] = values[part.module, what]
                    dark = value > 0.6 * largest
                    axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if dark else "white")
                    if what in taken[methods[part.module]]:
                        frame = Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, ec="#D55E00", lw=2.5)
                        axis.add_patch(frame)
            image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
            axis.set_xticks(range(len(kinds)), kinds)
            axis.set_yticks(range(len(layers)), layers)
            axis.set(title=title, ylabel="layer")
        figure.colorbar(image, ax=axes, label="% of all gain per 1000 parameters")
    return figure


def worth_maps_alt(parts: Sequence[Part], methods: Mapping[str, str]) -> str:
    """Alt text of `worth_maps`: for both parts the range over modules, the best module, and how many were taken."""
    values, texts = _worths(parts), []
    taken = {method: kinds for kinds, method in METHOD_OF.items()}
    for what, title in _PANELS.items():
        own = {part.module: values[part.module, what] for part in parts if part.kind == what}
        best = max(own, key=own.get)
        count = sum(what in taken[methods[module]] for module in own)
        texts.append(
            f"{title}: {min(own.values()):.2f} to {own[best]:.2f}, most in {best.rpartition('.')[2]} of layer "
            f"{layer_of(best)}; {count} of {len(own)} modules taken"
        )
    return f"Heat maps of layer by module, percent of all gain per 1000 parameters. {'. '.join(texts)}."


def accuracy_for_parameters(points: Sequence[Point]) -> Figure:
    """Accuracy against trained parameters, a panel a task: LoRA and DoRA on every module joined by lines over ranks.

    Bars are 95 % limits over seeds, cut at 0 and 100. Variants are moved sideways by a few percent.
    """
    tasks = _tasks(points)
    variants = sorted({point.name for point in points if point.is_variant})
    looks = dict(zip(variants, _VARIANT_LOOKS, strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(tasks) + 0.4, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axis, task in zip(axes, tasks, strict=True):
            own = [point for point in points if point.task == task]
            for method, marker in _MARKERS.items():
                line = [point for point in own if point.method == method and not point.is_variant]
                _draw(axis, line, METHOD_COLOURS[method], marker, METHOD_NAMES[method], "-")
            for place, (name, (colour, marker)) in enumerate(looks.items()):
                aside = 1 + _SIDEWAYS * (place - (len(looks) - 1) / 2)
                _draw(axis, [p for p in own if p.name == name and p.is_variant], colour, marker, name, "", aside)
            axis.set_xscale("log", base=2)
            ticks = [6e3, 12e3, 25e3, 50e3, 100e3]
            axis.set_xticks(ticks, [f"{tick / 1000:.0f}k" for tick in ticks])
            axis.minorticks_off()
            axis.set(title=TASK_NAMES[task], xlabel="trained parameters")
        axes[0].set_ylabel("accuracy (%)")
        entries = {}
        for axis in axes:
            entries |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def accuracy_for_parameters_alt(points: Sequence[Point]) -> str:
    """Alt text of `accuracy_for_parameters`: every point with its limits."""
    texts = []
    for task in _tasks(points):
        own = []
        for point in (point for point in points if point.task == task):
            found = point.interval
            limits = "" if math.isnan(found.low) else f" ({found.low:.1f} to {min(100.0, found.high):.1f})"
            own.append(f"{point.name} {found.estimate:.1f}{limits} for {point.parameters:,}")
        texts.append(f"{TASK_NAMES[task]}: {'; '.join(own)}")
    return f"Accuracy in percent with 95 % limits over seeds, against trained parameters. {'. '.join(texts)}."


def _draw(
    axis: Axes, points: Sequence[Point], colour: str, marker: str, label: str, line: str, aside: float = 1.0
) -> None:
    if not points:
        return
    intervals = [point.interval for point in points]
    x, y = [aside * point.parameters for point in points], [one.estimate for one in intervals]
    axis.errorbar(
        x, y, drawn_limits(intervals), fmt=marker, ls=line or "none", color=colour, mec="black", mew=0.5, ms=6.5, lw=1,
        elinewidth=0.9, capsize=2, label=label, alpha=0.9,
    )  # fmt: skip


def _worths(parts: Sequence[Part]) -> dict[tuple[str, str], float]:
    total = sum(part.gain for part in parts)
    return {(part.module, part.kind): 100 * 1000 * part.worth / total for part in parts}


def _axes(parts: Sequence[Part]) -> tuple[list[str], list[int]]:
    kinds = list(dict.fromkeys(part.module.rpartition(".")[2] for part in parts))
    return kinds, sorted({layer_of(part.module) for part in parts})


def _tasks(points: Sequence[Point]) -> list[str]:
    return [task for task in TASK_NAMES if any(point.task == task for point in points)]
