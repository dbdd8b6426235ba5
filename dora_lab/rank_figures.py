"""Figures of the study of ranks, each with its alt text: maps, accuracy against budget, truncation."""

import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dora_lab.figures import METHOD_COLOURS, STYLE, drawn_limits
from dora_lab.rank_results import CRITERION_NAMES, Cells, accuracy_table, percent
from dora_lab.ranks import CRITERIA
from dora_lab.statistics import Interval
from dora_lab.tables import METHOD_NAMES, TASK_NAMES

_COLOURS = ("#000000", "#E69F00", "#999933", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "os^Dv*Px"
_MODULE = re.compile(r"(?:.*\.)?(\d+)\.(?:.*\.)?([^.]+)$")  # layer and name of `model.layers.3.mlp.up_proj`


def as_map(values: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """(names of the columns, values (layers, modules)) of {module: value}; NaN where a layer lacks a module.

    Raises ValueError for a module outside of numbered layers.
    """
    places = {}
    for module in values:
        found = _MODULE.match(module)
        if found is None:
            raise ValueError(f"module {module!r} is in no numbered layer: it has no place on a map of layers")
        places[module] = (int(found[1]), found[2])
    columns = list(dict.fromkeys(name for _, name in places.values()))
    grid = np.full((1 + max(layer for layer, _ in places.values()), len(columns)), np.nan)
    for module, (layer, name) in places.items():
        grid[layer, columns.index(name)] = values[module]
    return columns, grid


def rank_maps(
    maps: Mapping[str, Mapping[str, float]], title: str, form: str = "{:.0f}", one_scale: bool = True
) -> Figure:
    """A panel for every entry of `maps`, {title: {module: value}}: layers down, modules across, the number in each.

    one_scale: whether a colour means the same in all panels; not for panels of different quantities.
    """
    grids = {name: as_map(values) for name, values in maps.items()}
    limits = {name: (np.nanmin(grid), np.nanmax(grid)) for name, (_, grid) in grids.items()}
    if one_scale:
        shared = min(low for low, _ in limits.values()), max(high for _, high in limits.values())
        limits = dict.fromkeys(grids, shared)
    layers = max(len(grid) for _, grid in grids.values())
    across = min(4, len(grids))
    down = -(-len(grids) // across)
    with matplotlib.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(2.7 * across + 0.4, (0.3 * layers + 0.8) * down + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
        for axes, (name, (columns, grid)) in zip(panels, grids.items(), strict=False):
            _map(axes, columns, grid, limits[name], form)
            axes.set_title(name, fontsize=9)
        for axes in panels[len(grids) :]:
            axes.set_visible(False)
        for axes in panels[::across]:
            axes.set_ylabel("layer")
        figure.suptitle(title, fontsize=10)
    return figure


def _map(axes: Axes, columns: Sequence[str], grid: np.ndarray, limits: tuple[float, float], form: str) -> None:
    axes.imshow(grid, cmap="Blues", vmin=limits[0], vmax=limits[1] * 1.15, aspect="auto")
    dark = (limits[0] + limits[1]) / 1.7
    for (layer, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if value > dark else "black"
            axes.text(column, layer, form.format(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), [name.removesuffix("_proj") for name in columns])
    axes.set_yticks(range(len(grid)))
    axes.tick_params(length=0)


def rank_maps_alt(maps: Mapping[str, Mapping[str, float]], title: str, form: str = "{:.0f}") -> str:
    """Alt text of `rank_maps`: the least and the largest of each map, and the mean of each kind of module."""
    parts = []
    for name, values in maps.items():
        columns, grid = as_map(values)
        means = ", ".join(
            f"{c.removesuffix('_proj')} {m:.1f}" for c, m in zip(columns, np.nanmean(grid, 0), strict=True)
        )
        parts.append(
            f"{name}: {form.format(np.nanmin(grid))} to {form.format(np.nanmax(grid))}, mean over layers {means}"
        )
    return f"{title}, a map of layers and modules. {'; '.join(parts)}."


def accuracy_by_budget(cells: Cells) -> Figure:
    """Accuracy against trained parameters, a panel a task: a line for uniform ranks, a mark for every other criterion.

    Bars are 95 % limits over seeds. Marks of one budget are drawn side by side.
    """
    table = accuracy_table(cells)
    tasks = list(dict.fromkeys(table["task"]))
    shown = [criterion for criterion in CRITERIA if criterion in set(table["criterion"])]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=False):
            for place, criterion in enumerate(shown):
                own = table[(table["task"] == task) & (table["criterion"] == criterion)].sort_values("rank")
                limits = drawn_limits(
                    [
                        Interval(r.accuracy, r.accuracy - r.half_width, r.accuracy + r.half_width)
                        for r in own.itertuples()
                    ]
                )
                which = CRITERIA.index(criterion)
                look = {"color": _COLOURS[which], "marker": _MARKERS[which], "label": CRITERION_NAMES[criterion]}
                line = "-" if criterion == "uniform" else "none"
                x = np.log2(own["rank"]) + 0.085 * (place - (len(shown) - 1) / 2) * (criterion != "uniform")
                axes.errorbar(x, own["accuracy"], limits, ls=line, lw=1.2, ms=5, capsize=2, elinewidth=0.9, **look)
            uniform = table[(table["task"] == task) & (table["criterion"] == "uniform")]
            ticks = {int(r.rank): f"rank {r.rank}\n{r.parameters:,}" for r in uniform.itertuples()}
            axes.set_xticks(np.log2(list(ticks)), ticks.values())
            axes.set(title=TASK_NAMES[task], xlabel="budget: uniform rank, trained parameters")
        panels[0].set_ylabel("accuracy (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def accuracy_by_budget_alt(cells: Cells) -> str:
    """Alt text of `accuracy_by_budget`: every mean with half of its interval."""
    table, parts = accuracy_table(cells), []
    for (task, rank), own in table.groupby(["task", "rank"], sort=False):
        means = [f"{CRITERION_NAMES[r.criterion]} {percent(r.accuracy, r.half_width)}" for r in own.itertuples()]
        parts.append(f"{TASK_NAMES[task]} at the budget of rank {rank}: {', '.join(means)}")
    return f"Accuracy in percent against trained parameters, 95 % limits over seeds. {'; '.join(parts)}."


def truncation_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Accuracy against the rank that is kept, a line a method: {method: [(mean kept rank, accuracy in percent)]}."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for (method, points), marker in zip(curves.items(), "so^D", strict=False):
            ranks, accuracies = zip(*points, strict=True)
            look = {"color": METHOD_COLOURS[method], "marker": marker, "label": METHOD_NAMES[method]}
            axes.plot(ranks, accuracies, lw=1.3, ms=5, **look)
        axes.set_xscale("symlog", base=2, linthresh=1)
        ticks = sorted({rank for points in curves.values() for rank, _ in points})
        axes.set_xticks(ticks, [f"{rank:g}" for rank in ticks])
        axes.minorticks_off()
        axes.set(xlabel="kept rank, mean over modules", ylabel="accuracy (%)", ylim=(0, 103))
        figure.legend(loc="outside right center", frameon=False)
    return figure


def truncation_curves_alt(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Alt text of `truncation_curves`: every point."""
    parts = [
        f"{METHOD_NAMES[method]}: " + ", ".join(f"{accuracy:.1f} at {rank:g}" for rank, accuracy in points)
        for method, points in curves.items()
    ]
    return f"Accuracy in percent against the mean rank kept of a trained update. {'; '.join(parts)}."
