"""The memory planner: choose a model and a way of training, see what its memory goes to and where it fits."""

import html

import ipywidgets
from matplotlib.figure import Figure

from dora_lab.job import METHODS, OPTIMIZERS, PRECISIONS, Job
from dora_lab.memory import GPUS, Plan, answer, changes, plan_job
from dora_lab.memory_figures import draw_bars, memory_bars_alt
from dora_lab.shapes import SHAPES
from dora_lab.widgets.panel import LABEL_WIDTH, WIDE, Drawing, Panel, canvas, slider, table_html

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)


def memory_planner(model: str = "llama-7b", gigabytes: int = 40) -> Panel:
    """Panel: model, method, rank, micro-batch, length, precision, checkpointing, dropout, optimizer → bytes by part.

    `gigabytes` is the GPU that the line below speaks of. Raises ValueError for an unknown model.
    """
    if model not in SHAPES:
        raise ValueError(f"unknown model {model!r}: choose one of {', '.join(SHAPES)}")
    controls = {
        "model": _choice("model", "Shape of the base model", SHAPES, model),
        "method": _choice("method", "What is trained; dora-peft is PEFT's DoRA", METHODS, "dora"),
        "precision": _choice("base precision", "Precision of the decoder's linear layers", PRECISIONS, "bfloat16"),
        "optimizer": _choice("optimizer", "Where AdamW's two states are, and how many bytes", OPTIMIZERS, "adamw"),
        "rank": slider(ipywidgets.SelectionSlider, "rank r", "Rank of the adapter", options=RANKS, value=32),
        "batch": slider(ipywidgets.IntSlider, "micro-batch", "Sequences at a time", value=16, min=1, max=64),
        "length": slider(ipywidgets.SelectionSlider, "tokens", "Tokens of a sequence", options=LENGTHS, value=512),
        "checkpointing": _switch("gradient checkpointing", "Keep each layer's input only, compute the rest again"),
        "dropout": _switch("dropout 0.05", "Dropout on what the adapter reads"),
        "gigabytes": _choice("GPU (GB)", "The GPU that the line below speaks of", GPUS, gigabytes),
    }

    def draw(gigabytes: int, **values) -> Drawing:
        try:
            job = _job(**values)
        except ValueError as error:
            return _refused(str(error))
        found = plan_job(job)
        line = f"<p>{html.escape(answer(found, gigabytes))}.</p>"
        rows = [[name, f"{changed.total / 1e9:.1f} GB"] for name, changed in changes(found)]
        table = table_html(["a single change", "the plan with it"], rows) if rows else ""
        return Drawing(planner_figure(found), memory_bars_alt({job.name: found}), line + table)

    return Panel(controls, draw)


def planner_figure(plan: Plan) -> Figure:
    """One plan as one bar, with a legend."""
    figure, (axes,) = canvas(8.4, 2.3)
    draw_bars(axes, {"": plan})
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{plan.job.shape.name}: {plan.job.name}", fontsize=10, pad=18)
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.42), fontsize=8)
    figure.subplots_adjust(left=0.04, right=0.98, top=0.78, bottom=0.45)
    return figure


def _job(model: str, precision: str, dropout: bool, **values) -> Job:
    return Job(SHAPES[model], base_precision=precision, dropout=0.05 if dropout else 0.0, **values)


def _refused(reason: str) -> Drawing:
    figure, (axes,) = canvas(8.4, 1.2)
    axes.axis("off")
    axes.text(0.5, 0.5, reason, ha="center", va="center", fontsize=10)
    return Drawing(figure, f"No plan, 0 GB: {reason}.")


def _choice(label: str, tooltip: str, options, value) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(
        description=label, tooltip=tooltip, options=tuple(options), value=value, style=LABEL_WIDTH, layout=WIDE
    )


def _switch(label: str, tooltip: str) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(description=label, tooltip=tooltip, value=True, style=LABEL_WIDTH, layout=WIDE)
