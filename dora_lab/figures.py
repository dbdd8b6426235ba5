"""The report's figures, from run records: Figure 3 (bars of accuracy) and Figure 1 (ΔM against ΔD).

Every figure comes with its alt text, made from the same numbers. Colours are Okabe and Ito's, and hatches and markers
say the same once more. The table beside them is made in `tables`.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dora_lab.statistics import Interval, seed_interval
from dora_lab.tables import (
    METHOD_NAMES,
    PUBLISHED_MODEL,
    TASK_NAMES,
    cells_of,
    kind_name,
    kinds_of,
    model_of,
    percent_interval,
    quoted_rows,
    results_table,
    shown_table,
    tasks_of,
    write_results,
)

__all__ = [
    "geometry_correlations",
    "geometry_scatter",
    "geometry_scatter_alt",
    "results_bars",
    "results_bars_alt",
    "results_table",
    "save_figure",
    "show",
    "shown_table",
    "write_results",
]

METHOD_COLOURS = {"lora": "#E69F00", "dora": "#0072B2", "full": "#009E73", "dora-magnitude": "#CC79A7"}
# Correlation of ΔD with ΔM on VL-BART, query matrices; Liu et al. 2024 (arXiv 2402.09353), Section 3.2
PAPER_CORRELATION = {"full": -0.62, "lora": 0.83, "dora": -0.31}
NO_TURN = 1e-12  # a ΔD that varies by no more than this is rounding: where only magnitudes are trained, say
_LAYER_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
_MARKERS = "os^DvPX*"
_METHOD_HATCHES = {"lora": "", "dora": "..", "full": "\\\\", "dora-magnitude": "++"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}


# --- bars: the report's Figure 3 --------------------------------------------------------------------------------------


def results_bars(records: Sequence, published: Mapping, failures: Sequence[Mapping] = ()) -> Figure:
    """The report's Figure 3: published LLaMA-7B on the left, these records on the right, never on one pair of axes.

    Own bars carry the 95 % interval over seeds and one dot a seed; a dashed line marks chance. A cell that failed or
    was not run says so in the place of its bar.
    """
    cells = cells_of(records, failures)
    tasks = tasks_of(cells)
    series = kinds_of(cells)
    quoted, hatches = [], {}
    for row in quoted_rows(published):
        extra = "" if row["row"].startswith("paper") else "///"
        quoted.append((_look(row["method"], extra, row["row"]), row["accuracy"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for index, (look, accuracy) in enumerate(quoted):
            for place, task in enumerate(tasks):
                x, width = _place(place, index, len(quoted))
                if task in accuracy:
                    _bar(left, x, width, look, Interval(accuracy[task], math.nan, math.nan))
        looks = []
        for index, kind in enumerate(series):
            method = kind[0]
            hatches[method] = hatches.get(method, -1) + 1  # a method's further ranks and variants get denser crosses
            looks.append(_look(method, "x" * hatches[method], kind_name(*kind)))
            for place, task in enumerate(tasks):
                x, width = _place(place, index, len(series))
                cell = cells.get((task, *kind))
                if cell is None or not cell["accuracy"]:
                    text = "not run" if cell is None else "failed"
                    right.text(x, 2, text, rotation=90, ha="center", va="bottom", color="#D55E00")
                    continue
                _bar(right, x, width, looks[-1], percent_interval(cell), [100 * a for a in cell["accuracy"].values()])
                chance = 100 * cell["chance"]
                right.plot([place - 0.46, place + 0.46], [chance, chance], "--", color="black", lw=1, zorder=3)
        if cells:
            looks += [_key("o", "black", "one seed", face="white"), _key("|", "black", "95 % over seeds, cut at 100")]
            looks.append(Line2D([], [], ls="--", color="black", lw=1, label="chance"))
        _finish(left, f"Published: {PUBLISHED_MODEL} on the real tasks", tasks, [look for look, _ in quoted], 2)
        _finish(right, f"These runs: {model_of(records, 'none yet')}", tasks, looks, 3)
        left.set_ylabel("accuracy (%)")
    return figure


def results_bars_alt(records: Sequence, published: Mapping, failures: Sequence[Mapping] = ()) -> str:
    """Alt text of `results_bars`: every bar with its value."""
    table = results_table(records, failures, published, "")
    shown, own = shown_table(table, brief=True), table["source"].str.startswith("profile ")
    parts = []
    for title, rows in ((PUBLISHED_MODEL + ", published", shown[~own]), (model_of(records, "No run"), shown[own])):
        texts = []
        for row in rows.to_dict("records"):
            name, _, rank = row.pop("row"), row.pop("model"), row.pop("rank")
            values = ", ".join(f"{task} {value}" for task, value in row.items())
            texts.append(f"{name}{f' (rank {rank})' if rank else ''}: {values}")
        parts.append(f"{title}: {'; '.join(texts) if texts else 'no bars'}.")
    return "Grouped bars of accuracy in percent, in two panels that are not comparable. " + " ".join(parts)


def _place(place: int, index: int, count: int) -> tuple[float, float]:
    """(centre, width) of bar `index` of `count` in the group at `place`."""
    width = 0.84 / max(count, 2)
    return place + (index - (count - 1) / 2) * width, 0.92 * width


def _look(method: str, extra_hatch: str, label: str) -> Patch:
    hatch = _METHOD_HATCHES[method] + extra_hatch
    return Patch(fc=METHOD_COLOURS[method], ec="black", lw=0.6, hatch=hatch or None, label=label)


def _bar(axis: Axes, x: float, width: float, look: Patch, value: Interval, dots: Sequence[float] = ()) -> None:
    axis.bar(x, value.estimate, width, fc=look.get_facecolor(), ec="black", lw=0.6, hatch=look.get_hatch())
    top = value.estimate
    if not math.isnan(value.half_width):
        axis.errorbar(x, value.estimate, drawn_limits([value]), color="black", capsize=3, lw=1.2, zorder=4)
        top = min(100.0, value.high)
    spread = np.linspace(-0.3, 0.3, len(dots)) * width if len(dots) > 1 else np.zeros(len(dots))
    axis.plot(x + spread, dots, "o", ms=2.8, mfc="white", mec="black", mew=0.6, zorder=3)
    top = max([top, *dots])
    axis.text(
        x, top + 1.2, f"{value.estimate:.1f}", ha="center", va="bottom", fontsize=7 if width > 0.16 else 6, zorder=5
    )


def drawn_limits(intervals: Sequence[Interval]) -> list[list[float]]:
    """[down, up]: lengths of the error bars of percentages. A limit of Student's t may lie past 0 or 100: cut there."""
    widths = [(i.estimate, i.estimate) if math.isnan(i.half_width) else (i.low, i.high) for i in intervals]
    return [
        [i.estimate - max(0.0, low) for i, (low, _) in zip(intervals, widths, strict=True)],
        [min(100.0, high) - i.estimate for i, (_, high) in zip(intervals, widths, strict=True)],
    ]


def _finish(axis: Axes, title: str, tasks: Sequence[str], handles: list, columns: int) -> None:
    axis.set_title(title)
    axis.set_xticks(range(len(tasks)), [TASK_NAMES.get(task, task) for task in tasks])
    axis.set_xlim(-0.6, len(tasks) - 0.4)
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    if handles:
        axis.legend(handles=handles, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False)


# --- update geometry: the report's Figure 1 ---------------------------------------------------------------------------


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
            groups = [group for _, group in chosen.groupby("seed")]
            found = [_pearson(group) for group in groups]
            found = [value for value in found if not math.isnan(value)]
            interval = _fisher_interval(found)
            row = {"method": method, "module": module, "seeds": len(found), "points": max(map(len, groups), default=0)}
            row |= {"correlation": interval.estimate, "low": interval.low, "high": interval.high}
            paper = PAPER_CORRELATION.get(method, math.nan) if module == "q_proj" else math.nan
            out.append(row | {"paper_vl_bart": paper})
    return pd.DataFrame(out)


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
            second.append(_key(_MARKERS[(checkpoint - 1) % len(_MARKERS)], "#777777", label))
        second += [_key("o", "black", "query (filled)"), _key("o", "black", "value (open)", face="none")]
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


def _key(marker: str, colour: str, label: str, face: str | None = None) -> Line2D:
    """A legend entry: one marker, no line."""
    return Line2D([], [], ls="", marker=marker, mfc=colour if face is None else face, mec=colour, label=label)


def _methods_of(frame: pd.DataFrame) -> list[str]:
    return [method for method in ("full", "lora", "dora", "dora-magnitude") if method in set(frame["method"])]


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


# --- showing and saving -----------------------------------------------------------------------------------------------


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `<name>.png` and `<name>.svg`; the same figure gives the same bytes. Returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(paths[0], dpi=150, bbox_inches="tight", metadata={"Software": None})
        figure.savefig(paths[1], bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return paths


def show(figure: Figure, alt: str) -> None:
    """Display the figure as a PNG with its alt text, which is also the plain-text form."""
    from IPython.display import display

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    data = {"image/png": base64.b64encode(image.getvalue()).decode(), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)
