"""The report's Figure 1, ΔM against ΔD, and the correlation of the two, with alt text from the same numbers."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dora_lab.figures import STYLE, marker_key
from dora_lab.statistics import Interval, seed_interval
from dora_lab.tables import METHOD_NAMES

# Correlation of ΔD with ΔM on VL-BART, query matrices; Liu et al. 2024 (arXiv 2402.09353), Section 3.2
PAPER_CORRELATION = {"full": -0.62, "lora": 0.83, "dora": -0.31}
NO_TURN = 1e-12  # a ΔD that varies by no more than this is rounding: where only magnitudes are trained, say
_LAYER_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
_MARKERS = "os^DvPX*"


def geometry_correlations(rows: Sequence[Mapping]) -> pd.DataFrame:
    """Pearson correlation of ΔD with ΔM over layers and checkpoints: one a seed, then mean and 95 % limits over seeds.

    Mean and limits are taken on Fisher's scale, artanh r, and brought back.

    rows: dicts with method, seed, step, layer, module, delta_magnitude, delta_direction of one task. Columns `method`,
    `module` ("q_proj", "v_proj", "both"), `seeds`, `points` (a seed), `correlation`, `low`, `high`, `paper_vl_bart`.
    The paper's value is for query matrices. A seed whose ΔM or ΔD does not vary has no correlation and is not counted
    in `seeds`.
    """
    frame = _geometry_frame(rows)
    out = []
    for method in _methods_of(frame):
        for module in [*sorted(frame["module"].unique()), "both"]:
            chosen = frame[(frame["method"] == method) & ((frame["module"] == module) | (module == "both"))]
            found = list(_by_seed(chosen).values())
            interval = _fisher_interval(found)
            points = max(chosen.groupby("seed").size(), default=0)
            row = {"method": method, "module": module, "seeds": len(found), "points": points}
            row |= {"correlation": interval.estimate, "low": interval.low, "high": interval.high}
            paper = PAPER_CORRELATION.get(method, math.nan) if module == "q_proj" else math.nan
            out.append(row | {"paper_vl_bart": paper})
    return pd.DataFrame(out)


def correlations_by_seed(rows: Sequence[Mapping], method: str, module: str) -> dict[int, float]:
    """{seed: Pearson correlation of ΔD with ΔM} of one method and module; seeds that have none are left out."""
    frame = _geometry_frame(rows)
    return _by_seed(frame[(frame["method"] == method) & (frame["module"] == module)])


def geometry_scatter(rows: Sequence[Mapping]) -> Figure:
    """ΔM against ΔD, one panel a method: colour is the layer, shape the checkpoint, filled query and open value.

    A point is the mean over seeds, the line their least-squares fit; the title has the correlation (mean over seeds,
    query and value together) with its 95 % limits. Each panel has its own scale. Raises ValueError for no rows.
    """
    frame = _geometry_frame(rows)
    methods, layers = _methods_of(frame), sorted(frame["layer"].unique())
    checkpoints = sorted(frame["checkpoint"].unique())
    colours = {layer: _LAYER_COLOURS[i % len(_LAYER_COLOURS)] for i, layer in enumerate(layers)}
    both = geometry_correlations(rows).query("module == 'both'").set_index("method")
    keys = ["method", "module", "layer", "checkpoint"]
    means = frame.groupby(keys)[["delta_magnitude", "delta_direction"]].mean().reset_index()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5 * len(methods) + 0.4, 4.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(methods), squeeze=False)[0]
        for axis, method in zip(axes, methods, strict=True):
            own = means[means["method"] == method]
            if np.ptp(own["delta_direction"]) > NO_TURN:
                ends = np.array([own["delta_direction"].min(), own["delta_direction"].max()])
                fit = np.polyfit(own["delta_direction"], own["delta_magnitude"], 1)
                axis.plot(ends, np.polyval(fit, ends), color="#777777", lw=1, zorder=0)
            for point in own.itertuples():
                face = colours[point.layer] if point.module == "q_proj" else "none"
                marker = _MARKERS[(point.checkpoint - 1) % len(_MARKERS)]
                x, y, edge = point.delta_direction, point.delta_magnitude, colours[point.layer]
                axis.scatter(x, y, 36, marker=marker, fc=face, ec=edge, lw=1.2)
            axis.set_title(f"{METHOD_NAMES[method]}\n{_correlation_text(both.loc[method])}", y=1.07)
            axis.set_xlabel("ΔD, mean of 1 − cosine")
            axis.margins(0.08)
            axis.ticklabel_format(style="sci", scilimits=(-2, 3))
        axes[0].set_ylabel("ΔM, mean change of magnitude")
        first = [Patch(fc=colour, label=f"layer {layer}") for layer, colour in colours.items()]
        steps, second = frame.groupby("checkpoint")["step"].unique(), []
        for checkpoint in checkpoints:
            label = f"step {steps[checkpoint][0]}" if len(steps[checkpoint]) == 1 else f"checkpoint {checkpoint}"
            second.append(marker_key(_MARKERS[(checkpoint - 1) % len(_MARKERS)], "#777777", label))
        second += [marker_key("o", "black", "query (filled)"), marker_key("o", "black", "value (open)", face="none")]
        blank = Line2D([], [], ls="", label=" ")
        pairs = zip_longest(first, second, fillvalue=blank)  # a legend fills column by column
        entries = [entry for pair in pairs for entry in pair]
        figure.legend(handles=entries, loc="outside lower center", ncols=len(entries) // 2, frameon=False)
    return figure


def geometry_scatter_alt(rows: Sequence[Mapping]) -> str:
    """Alt text of `geometry_scatter`: per method the correlation and the ranges of both axes."""
    frame, table = _geometry_frame(rows), geometry_correlations(rows)
    parts = []
    for method in _methods_of(frame):
        own, of = frame[frame["method"] == method], table[table["method"] == method].set_index("module")
        split = ", ".join(f"{m} {of.loc[m, 'correlation']:+.2f}" for m in of.index if m != "both")
        parts.append(
            f"{METHOD_NAMES[method]}: {_correlation_text(of.loc['both'])} ({split}); "
            f"direction change {own['delta_direction'].min():.2g} to {own['delta_direction'].max():.2g}, "
            f"magnitude change {own['delta_magnitude'].min():.2g} to {own['delta_magnitude'].max():.2g}."
        )
    shape = f"{frame['layer'].nunique()} layers and {frame['checkpoint'].nunique()} checkpoints"
    return f"Magnitude change against direction change, one panel a method, {shape}. " + " ".join(parts)


def _geometry_frame(rows: Sequence[Mapping]) -> pd.DataFrame:
    """The rows with `checkpoint`, the place 1, 2, … of the step within its method and seed."""
    frame = pd.DataFrame(list(rows))
    needed = ["method", "seed", "step", "layer", "module", "delta_magnitude", "delta_direction"]
    missing = [name for name in needed if name not in frame]
    if missing:
        raise ValueError(f"geometry rows lack {', '.join(missing)}: give rows of geometry.jsonl with method and seed")
    if "task" in frame and frame["task"].nunique() > 1:
        raise ValueError(f"geometry rows of the tasks {', '.join(sorted(frame['task'].unique()))}: give those of one")
    frame["checkpoint"] = frame.groupby(["method", "seed"])["step"].rank("dense").astype(int)
    return frame


def _methods_of(frame: pd.DataFrame) -> list[str]:
    return [method for method in ("full", "lora", "dora", "dora-magnitude") if method in set(frame["method"])]


def _by_seed(rows: pd.DataFrame) -> dict[int, float]:
    found = {int(seed): _pearson(group) for seed, group in rows.groupby("seed")}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def _pearson(group: pd.DataFrame) -> float:
    x, y = group["delta_direction"].to_numpy(), group["delta_magnitude"].to_numpy()
    if len(group) < 3 or np.ptp(x) <= NO_TURN or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _fisher_interval(correlations: Sequence[float]) -> Interval:
    if not correlations:
        return Interval(math.nan, math.nan, math.nan, seeds=0)
    z = seed_interval(np.arctanh(np.clip(correlations, -1 + 1e-12, 1 - 1e-12)))
    return Interval(math.tanh(z.estimate), math.tanh(z.low), math.tanh(z.high), seeds=z.seeds)


def _correlation_text(row: pd.Series) -> str:
    if math.isnan(row["correlation"]):
        return "no correlation defined"
    if row["seeds"] == 1:
        return f"r = {row['correlation']:+.2f} (1 seed)"
    return f"r = {row['correlation']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}, {row['seeds']} seeds)"
