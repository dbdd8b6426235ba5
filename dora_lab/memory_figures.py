"""Figures of memory plans, each with its alt text made from the same numbers."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dora_lab.figures import STYLE
from dora_lab.memory import GPUS, PARTS, RESERVED_BYTES, Plan

# Okabe and Ito's colours; hatches say the same once more
PART_LOOKS = {
    "weights": ("#999999", ""),
    "adapter": ("#009E73", "xx"),
    "optimizer": ("#CC79A7", "\\\\"),
    "gradients": ("#F0E442", "++"),
    "activations": ("#0072B2", ""),
    "logits": ("#E69F00", "//"),
    "workspace": ("#56B4E9", ".."),
    "norms": ("#D55E00", "||"),
}
_LINES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))


def memory_bars(plans: Mapping[str, Plan], sizes: Sequence[int] = GPUS) -> Figure:
    """One bar for each plan, {label: plan}: its parts in GB one after another, and the sizes of GPUs as lines.

    Parts that are nothing in every plan are left out of the legend. Raises ValueError for no plan.
    """
    if not plans:
        raise ValueError("memory_bars needs at least one plan")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.3 + 0.36 * len(plans)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw_bars(axes, plans, sizes)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def draw_bars(axes, plans: Mapping[str, Plan], sizes: Sequence[int] = GPUS) -> None:
    """The bars of `memory_bars` on axes that are there, with labels for a legend."""
    places = range(len(plans))[::-1]
    left = [0.0] * len(plans)
    for part, (colour, hatch) in PART_LOOKS.items():
        values = [getattr(plan, part) / 1e9 for plan in plans.values()]
        if any(value > 0.02 for value in values):
            axes.barh(places, values, 0.68, left, color=colour, ec="black", lw=0.5, hatch=hatch, label=part)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total in zip(places, left, strict=True):
        box = {"fc": "white", "ec": "none", "pad": 1}  # a GPU's line may pass here
        axes.text(total + 0.012 * max(left), place, f"{total:.1f}", va="center", fontsize=8, bbox=box, zorder=3)
    widest = max(*left, *[size for size in sizes if size <= 1.3 * max(left)] or [0])
    for size in sizes:
        if size <= 1.1 * widest:
            axes.axvline(size, color="black", ls="--", lw=0.9)
            axes.text(size, len(plans) - 0.45, f"{size} GB", ha="center", va="bottom", fontsize=8)
    axes.set_yticks(list(places), list(plans))
    axes.set(xlabel="GB at the peak", xlim=(0, 1.1 * widest), ylim=(-0.6, len(plans) - 0.45))


def memory_bars_alt(plans: Mapping[str, Plan], sizes: Sequence[int] = GPUS) -> str:
    """Alt text of `memory_bars`: every total with its parts, and the GPUs that it goes into."""
    texts = []
    for label, plan in plans.items():
        parts = ", ".join(f"{part} {getattr(plan, part) / 1e9:.1f}" for part in PARTS if getattr(plan, part) > 5e6)
        fitting = [f"{size}" for size in sizes if plan.total + RESERVED_BYTES <= size * 10**9]
        where = f"fits on {', '.join(fitting)} GB" if fitting else "fits on none"
        texts.append(f"{label}: {plan.total / 1e9:.1f} GB ({parts}), {where}")
    return f"Planned memory at the peak: {'; '.join(texts)}."


def length_lines(curves: Mapping[str, Mapping[int, Plan]], size: int) -> Figure:
    """Planned GB against the length of the sequences, {label: {length: plan}}; a GPU's size dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for (label, plans), (colour, marker, line) in zip(curves.items(), _LINES, strict=False):
            values = [plan.total / 1e9 for plan in plans.values()]
            axes.plot(list(plans), values, color=colour, marker=marker, ls=line, ms=4, lw=1.5, label=label)
        axes.axhline(size, color="black", ls="--", lw=0.9)
        axes.text(0, size, f" {size} GB", va="bottom", fontsize=8)
        axes.set(xlabel="longest sequence of the micro-batch (tokens)", ylabel="GB at the peak", ylim=(0, None))
        axes.set_xlim(0, None)
        figure.legend(loc="outside right center", frameon=False)
    return figure


def length_lines_alt(curves: Mapping[str, Mapping[int, Plan]], size: int) -> str:
    """Alt text of `length_lines`: both ends of every line, and the longest drawn length under the size."""
    texts = []
    for label, plans in curves.items():
        first, last = min(plans), max(plans)
        under = [length for length, plan in plans.items() if plan.total + RESERVED_BYTES <= size * 10**9]
        fits = f"fits on {size} GB up to {max(under)} tokens" if under else f"never fits on {size} GB"
        ends = ", ".join(f"{plans[length].total / 1e9:.1f} GB at {length} tokens" for length in (first, last))
        texts.append(f"{label}: {ends}; {fits}")
    return f"Planned memory against the length of the sequences. {'. '.join(texts)}."
