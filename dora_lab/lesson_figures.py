"""Figures that carry an argument of chapters 01 to 03, each with its alt text made from the same numbers.

`show(figure, alt)` of `figures` puts them on the page. Methods have the colours of `figures.METHOD_COLOURS`; markers
say the same once more.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dora_lab.figures import METHOD_COLOURS, STYLE
from dora_lab.geometry_figures import geometry_correlations
from dora_lab.tables import METHOD_NAMES

METHOD_MARKERS = {"full": "o", "lora": "s", "dora": "^", "dora-magnitude": "D"}
_COLOURS = ("#000000", "#D55E00", "#56B4E9", "#CC79A7", "#009E73")
_MARKERS = "osD^v"
_BYTES_PER_MIB = 2**20


def _figure(width: float, height: float, panels: int = 1, **settings) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, **settings)[0])


# --- chapter 01: what a low-rank update reaches -----------------------------------------------------------------------


def fit_curves(errors: Mapping[int, Sequence[float]], bounds: Mapping[int, float]) -> Figure:
    """Relative error of a fitted B·A over steps, one line a rank, with the bound of the truncated SVD dashed.

    errors: {rank: ‖B·A - ΔW‖ / ‖ΔW‖ after each step}; bounds: {rank: the least possible value}.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(7.2, 3.4)
        for place, (rank, curve) in enumerate(errors.items()):
            colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
            every = max(1, len(curve) // 8)
            axis.plot(curve, color=colour, marker=marker, markevery=every, ms=4, lw=1.3, label=f"rank {rank}")
            axis.axhline(bounds[rank], color=colour, ls="--", lw=1)
        axis.set(xlabel="step of gradient descent", ylabel="relative error ‖BA − ΔW‖ / ‖ΔW‖", ylim=(0, 1.03))
        handles, labels = axis.get_legend_handles_labels()
        handles.append(Line2D([], [], color="black", ls="--", lw=1))
        figure.legend(handles, [*labels, "bound, truncated SVD"], loc="outside right center", frameon=False)
    return figure


def fit_curves_alt(errors: Mapping[int, Sequence[float]], bounds: Mapping[int, float]) -> str:
    """Alt text of `fit_curves`: where each rank ends, beside its bound."""
    parts = [f"rank {rank} ends at {curve[-1]:.4f}, bound {bounds[rank]:.4f}" for rank, curve in errors.items()]
    steps = max(map(len, errors.values()))
    return f"Relative error over {steps} steps of gradient descent: {'; '.join(parts)}."


def rank_bounds(bounds: Mapping[str, Sequence[float]], marked: int) -> Figure:
    """Least relative error of any update of rank 0, 1, 2, …, one line a target; `marked` is a rank to look at."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(7.6, 3.4)
        for place, (name, curve) in enumerate(bounds.items()):
            colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
            axis.plot(curve, color=colour, marker=marker, markevery=(place * 30, 128), ms=4, lw=1.3, label=name)
        axis.axvline(marked, color="0.5", ls=":", lw=1)
        axis.annotate(f" rank {marked}", (marked, 1.02), color="0.3", va="bottom", fontsize=8)
        axis.set(xlabel="rank of the update", ylabel="least relative error", ylim=(0, 1.09), xlim=(0, None))
        figure.legend(loc="outside right center", frameon=False)
    return figure


def rank_bounds_alt(bounds: Mapping[str, Sequence[float]], marked: int) -> str:
    """Alt text of `rank_bounds`: each target's least error at the marked rank and at half of the full rank."""
    parts = []
    for name, curve in bounds.items():
        half = (len(curve) - 1) // 2
        parts.append(f"{name}: {curve[marked]:.3f} at rank {marked}, {curve[half]:.3f} at rank {half}")
    return f"Least relative error of a low-rank update against its rank. {'; '.join(parts)}."


# --- chapter 02: magnitude and direction ------------------------------------------------------------------------------


def vector_change(base: Sequence[float], weight: Sequence[float]) -> Figure:
    """One row of a weight in the plane, before and after: its magnitude is the length, its direction the angle."""
    before, after, angle = _polar(base, weight)
    reach = 1.25 * max(before, after)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(6.4, 3.7)
        looks = (("before", base, "#000000", "o", before), ("after", weight, "#D55E00", "s", after))
        for name, vector, colour, marker, length in looks:
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", vector, (0, 0), arrowprops=arrow)
            circle = np.linspace(0, 2 * np.pi, 200)
            axis.plot(length * np.cos(circle), length * np.sin(circle), color=colour, ls=":", lw=0.8)
            label = f"{name}: magnitude {length:.2f}"
            axis.plot(*vector, marker=marker, color=colour, ms=6, ls="", label=label)
        start, end = np.arctan2(base[1], base[0]), np.arctan2(weight[1], weight[0])
        end = start + (end - start + np.pi) % (2 * np.pi) - np.pi
        arc, radius = np.linspace(start, end, 60), 0.35 * min(before, after)
        label = f"angle {np.degrees(angle):.1f}°, 1 − cos = {1 - np.cos(angle):.3f}"
        axis.plot(radius * np.cos(arc), radius * np.sin(arc), color="#0072B2", lw=2, label=label)
        axis.axhline(0, color="0.85", lw=0.8, zorder=0)
        axis.axvline(0, color="0.85", lw=0.8, zorder=0)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axis.set(xlabel="weight of input 1", ylabel="weight of input 2")
        figure.legend(loc="outside right center", frameon=False)
    return figure


def vector_change_alt(base: Sequence[float], weight: Sequence[float]) -> str:
    """Alt text of `vector_change`: both magnitudes and the angle between."""
    before, after, angle = _polar(base, weight)
    return (
        f"Two arrows from the origin: before, magnitude {before:.2f}; after, magnitude {after:.2f}; "
        f"the angle between them is {np.degrees(angle):.1f} degrees, so 1 minus cosine is {1 - np.cos(angle):.3f}."
    )


def _polar(base: Sequence[float], weight: Sequence[float]) -> tuple[float, float, float]:
    """(length before, length after, angle between in radians)"""
    before, after = float(np.hypot(*base)), float(np.hypot(*weight))
    return before, after, float(np.arccos(np.clip(np.dot(base, weight) / (before * after), -1, 1)))


def toy_geometry(rows: Sequence[Mapping], target: Sequence[Mapping]) -> Figure:
    """ΔM against ΔD of fitted toy layers, one panel a method, later checkpoints darker; grey crosses are the targets.

    rows: dicts with method, seed, step, layer, module, delta_magnitude, delta_direction, as `geometry_correlations`
    reads them. target: dicts with delta_magnitude and delta_direction, what a perfect fit would have.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    steps = sorted({row["step"] for row in rows})
    correlation = geometry_correlations(rows).query("module == 'both'").set_index("method")["correlation"]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(10, 3.7, len(methods), sharex=True, sharey=True)
        for axis, method in zip(axes, methods, strict=True):
            axis.plot(*_points(target), "x", color="0.75", ms=4, mew=0.8, zorder=1)
            for place, step in enumerate(steps):
                points = _points([row for row in rows if row["method"] == method and row["step"] == step])
                strength = 0.25 + 0.75 * (place + 1) / len(steps)
                look = {"color": METHOD_COLOURS[method], "alpha": strength, "mew": 0, "ms": 2.5 + 0.5 * place}
                axis.plot(*points, METHOD_MARKERS[method], **look, zorder=2 + place)
            axis.set_title(f"{METHOD_NAMES[method]}: r = {correlation[method]:+.2f}")
            axis.set_xlabel("ΔD, mean of 1 − cosine")
        axes[0].set_ylabel("ΔM, mean change of magnitude")
        handles = [Line2D([], [], ls="", marker="x", color="0.6", label="target")]
        for place, step in enumerate(steps):
            strength = 0.25 + 0.75 * (place + 1) / len(steps)
            look = {"marker": "o", "color": "black", "alpha": strength, "mew": 0, "ms": 2.5 + 0.5 * place}
            handles.append(Line2D([], [], ls="", **look, label=f"step {step}"))
        figure.legend(handles=handles, ncols=len(handles), loc="outside lower center", frameon=False)
    return figure


def toy_geometry_alt(rows: Sequence[Mapping], target: Sequence[Mapping]) -> str:
    """Alt text of `toy_geometry`: every correlation, the targets' too, and the largest changes."""
    table = geometry_correlations(rows).query("module == 'both'")
    x, y = _points(target)
    parts = [f"targets r = {np.corrcoef(x, y)[0, 1]:+.2f}, ΔD up to {max(x):.3f}, ΔM up to {max(y):.3f}"]
    for row in table.itertuples():
        own = _points([r for r in rows if r["method"] == row.method])
        parts.append(
            f"{METHOD_NAMES[row.method]} r = {row.correlation:+.2f} ({row.low:+.2f} to {row.high:+.2f}), "
            f"ΔD up to {max(own[0]):.3f}, ΔM up to {max(own[1]):.3f}"
        )
    return f"Magnitude change against direction change of toy layers, one panel a method: {'; '.join(parts)}."


def _points(rows: Sequence[Mapping]) -> tuple[list[float], list[float]]:
    return [row["delta_direction"] for row in rows], [row["delta_magnitude"] for row in rows]


# --- chapter 03: what is kept for the backward pass -------------------------------------------------------------------


def saved_bytes(kept: Mapping[str, int]) -> Figure:
    """Bytes that a forward keeps for its backward, one bar a way of writing the layer."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(7.6, 0.9 + 0.38 * len(kept))
        places, sizes = range(len(kept))[::-1], [size / _BYTES_PER_MIB for size in kept.values()]
        colours = [METHOD_COLOURS["lora" if name.startswith("LoRA") else "dora"] for name in kept]
        hatches = ["//" if name.startswith("LoRA") else "" for name in kept]
        axis.barh(places, sizes, 0.7, color=colours, hatch=hatches, edgecolor="black", lw=0.6)
        for place, size in zip(places, sizes, strict=True):
            axis.text(size, place, f" {size:.2f}", va="center", fontsize=8)
        axis.set_yticks(places, list(kept))
        axis.set(xlabel="kept for the backward pass (MiB)", xlim=(0, 1.12 * max(sizes)))
    return figure


def saved_bytes_alt(kept: Mapping[str, int]) -> str:
    """Alt text of `saved_bytes`: every bar."""
    parts = [f"{name} {size / _BYTES_PER_MIB:.2f} MiB" for name, size in kept.items()]
    return f"Bars of what a forward keeps for its backward: {', '.join(parts)}."
