"""Curves: what the base model learned when, and accuracy against the rank. Each comes with its alt text."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dora_lab.figures import METHOD_COLOURS, STYLE, drawn_limits
from dora_lab.tables import METHOD_NAMES, TASK_NAMES, cells_of, percent_interval, tasks_of

SKILL_NAMES = {
    "wish": "who takes what (all things)",
    "story": "next step of a story (all activities)",
    "binding": "label of a listed item",
    "claims": "is the claim so?",
    "step_choices": "label of an activity's step",
    "truth_quiz": "claim in other words",
    "thing_quiz": "which of the things?",
    "step_quiz": "which step comes next?",
}
_COLOURS = ("#56B4E9", "#009E73", "#000000", "#E69F00", "#0072B2", "#D55E00", "#CC79A7", "#999933")
_MARKERS = "osD^vP*X"


def skill_curves(pretraining: Mapping) -> Figure:
    """Share of right words by kind of document over the steps of pretraining, its stages marked.

    `pretraining`: what `pretraining.json` holds; of it `skills` (step and a share for each kind) and `stages`.
    """
    skills = pretraining["skills"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        steps = [row["step"] for row in skills]
        for (kind, name), colour, marker in zip(SKILL_NAMES.items(), _COLOURS, _MARKERS, strict=True):
            shares = [row[kind] for row in skills]
            axes.plot(steps, shares, color=colour, marker=marker, ms=4, lw=1.2, label=name)
        start = 0
        for stage in pretraining["stages"]:
            axes.axvline(start, color="0.8", lw=0.8, zorder=0)
            axes.annotate(stage["name"], (start, 1.02), xycoords=("data", "axes fraction"), fontsize=7, color="0.3")
            start += stage["steps"]
        axes.set(xlabel="pretraining step", ylabel="right words, held-out questions", ylim=(0, 1.02), xlim=(0, None))
        figure.legend(loc="outside right center", frameon=False)
    return figure


def skill_curves_alt(pretraining: Mapping) -> str:
    """Alt text of `skill_curves`: where every skill ended and when it first passed 0.9."""
    skills = pretraining["skills"]
    texts = []
    for kind, name in SKILL_NAMES.items():
        passed = next((row["step"] for row in skills if row[kind] >= 0.9), None)
        when = "never above 0.9" if passed is None else f"first above 0.9 at step {passed}"
        texts.append(f"{name} {skills[-1][kind]:.2f}, {when}")
    return f"Share of right words over {skills[-1]['step']} pretraining steps, at the end: {'; '.join(texts)}."


def accuracy_by_rank(records: Sequence) -> Figure:
    """Test accuracy of the plain runs against rank, a panel a task; dashed full fine-tuning, dotted chance; 95 %."""
    cells = cells_of(records, ())
    tasks = tasks_of(cells)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for method, marker in (("lora", "o"), ("dora", "s")):
                ranks, found = _by_rank(cells, task, method)
                means = [interval.estimate for interval in found]
                look = {"color": METHOD_COLOURS[method], "marker": marker, "label": METHOD_NAMES[method]}
                axes.errorbar(ranks, means, drawn_limits(found), capsize=3, ms=5, lw=1.2, **look)
            full = cells.get((task, "full", None, None))
            if full:
                level = percent_interval(full).estimate
                axes.axhline(level, color=METHOD_COLOURS["full"], ls="--", lw=1, label=METHOD_NAMES["full"])
            chance = next(cell["chance"] for key, cell in cells.items() if key[0] == task)
            axes.axhline(100 * chance, color="black", ls=":", lw=1, label="chance")
            axes.set_xscale("log", base=2)
            shown = sorted({key[2] for key in cells if key[0] == task and key[2]})
            axes.set_xticks(shown, [str(rank) for rank in shown])
            axes.set(title=TASK_NAMES[task], xlabel="rank", ylim=(0, 103))
        panels[0].set_ylabel("accuracy (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def accuracy_by_rank_alt(records: Sequence) -> str:
    """Alt text of `accuracy_by_rank`: every mean."""
    cells = cells_of(records, ())
    texts = []
    for task in tasks_of(cells):
        for method in ("lora", "dora"):
            ranks, found = _by_rank(cells, task, method)
            values = [f"{interval.estimate:.1f} at rank {rank}" for rank, interval in zip(ranks, found, strict=True)]
            if values:
                texts.append(f"{TASK_NAMES[task]} {METHOD_NAMES[method]}: {', '.join(values)}")
    return f"Accuracy in percent against the rank. {'; '.join(texts)}."


def _by_rank(cells: Mapping, task: str, method: str) -> tuple[list[int], list]:
    ranks = sorted(rank for t, m, rank, variant in cells if (t, m, variant) == (task, method, None))
    return ranks, [percent_interval(cells[task, method, rank, None]) for rank in ranks]
