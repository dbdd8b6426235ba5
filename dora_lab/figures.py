"""What figures share (style, colours, saving, showing), and the report's Figure 3: bars of accuracy from run records.

Every figure comes with its alt text, made from the same numbers. Colours are Okabe and Ito's, and hatches and markers
say the same once more. The table beside the bars is made in `tables`, Figure 1 in `geometry_figures`.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dora_lab.statistics import Interval
from dora_lab.tables import (
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
)

METHOD_COLOURS = {"lora": "#E69F00", "dora": "#0072B2", "full": "#009E73", "dora-magnitude": "#CC79A7"}
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
            looks += [
                marker_key("o", "black", "one seed", face="white"),
                marker_key("|", "black", "95 % over seeds, cut at 100"),
            ]
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


def marker_key(marker: str, colour: str, label: str, face: str | None = None) -> Line2D:
    """A legend entry: one marker, no line."""
    return Line2D([], [], ls="", marker=marker, mfc=colour if face is None else face, mec=colour, label=label)


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
