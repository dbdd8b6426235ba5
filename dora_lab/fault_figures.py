"""The figure of the faults: what each did to both accuracies, and to the difference of the two."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dora_lab.faults import METHODS, Effect
from dora_lab.figures import METHOD_COLOURS, STYLE
from dora_lab.statistics import Interval, in_points, wording
from dora_lab.tables import METHOD_NAMES, TASK_NAMES

_MARKERS = {"lora": "o", "dora": "s"}
_LEADS = {False: ("#666666", "o", "without the fault"), True: ("#000000", "D", "with the fault")}


def fault_lines(effects: Sequence[Effect]) -> Figure:
    """A panel a task in two rows: what the fault adds to each method's accuracy; DoRA minus LoRA without and with it.

    Percentage points with 95 % limits; a marker is filled where they leave out 0. A fault that has no runs on a task
    leaves its place empty.
    """
    tasks, faults = _places(effects)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.6 + 0.62 * len(faults)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, len(tasks), sharey=True, squeeze=False)
        for column, task in enumerate(tasks):
            upper, lower = panels[:, column]
            for effect in effects:
                if effect.task != task:
                    continue
                place = faults.index(effect.fault)
                for shift, method in zip((-0.17, 0.17), METHODS, strict=True):
                    colour, name = METHOD_COLOURS[method], METHOD_NAMES[method]
                    _line(upper, effect.change[method], place + shift, colour, _MARKERS[method], name)
                for shift, faulty in ((-0.17, False), (0.17, True)):
                    _line(lower, effect.lead[faulty], place + shift, *_LEADS[faulty])
            upper.set(title=TASK_NAMES[task], xlabel="with − without (points)")
            lower.set(xlabel="DoRA − LoRA (points)")
            for axes in (upper, lower):
                axes.axvline(0, color="black", lw=0.8, ls="--")
        for axes in panels[:, 0]:
            axes.set_yticks(range(len(faults)), [_label(fault, effects) for fault in faults])
            axes.set_ylim(len(faults) - 0.4, -0.6)
        for row, title in zip(panels, ("accuracy", "lead"), strict=True):
            handles = dict(zip(*reversed(row[0].get_legend_handles_labels()), strict=True))
            row[-1].legend(
                handles.values(), handles.keys(), title=title, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
            )
    return figure


def fault_lines_alt(effects: Sequence[Effect]) -> str:
    """Alt text of `fault_lines`: for every fault and task both changes and both leads, with what they let one say."""
    parts = []
    for one in effects:
        changes = ", ".join(f"{METHOD_NAMES[method]} {in_points(one.change[method])}" for method in METHODS)
        leads = f"DoRA minus LoRA {in_points(one.lead[False])} without, {in_points(one.lead[True])} with"
        parts.append(f"{one.fault} on {TASK_NAMES[one.task]}: {changes}; {leads}: {one.verdict}")
    return f"What each fault does to accuracy, percentage points with 95 % limits. {'. '.join(parts)}."


def _places(effects: Sequence[Effect]) -> tuple[list[str], list[str]]:
    found = {one.task for one in effects}
    return [task for task in TASK_NAMES if task in found], list(dict.fromkeys(one.fault for one in effects))


def _label(fault: str, effects: Sequence[Effect]) -> str:
    """The fault, and how many seeds it has on its tasks."""
    counts = sorted({len(one.seeds) for one in effects if one.fault == fault})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{fault.replace('-', ' ')}\n{seeds} {'seed' if counts[-1] == 1 else 'seeds'}"


def _line(axes: Axes, one: Interval, place: float, colour: str, marker: str, label: str) -> None:
    estimate, low, high = (100 * value for value in (one.estimate, one.low, one.high))
    face = "white" if wording(one).startswith("no") else colour
    axes.plot([low, high], [place, place], color=colour, lw=1.4)
    axes.plot(estimate, place, marker, mfc=face, mec=colour, color=colour, ms=5, label=label)
