"""Sizes that decide: what an adapter trains, by kind of module, and how long prompts are. With figures of both."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from dora_lab.adapters import adapted_modules
from dora_lab.figures import STYLE
from dora_lab.kernels import features_of
from dora_lab.tables import TASK_NAMES

PARTS = {"A": "#56B4E9", "B": "#0072B2", "m": "#D55E00"}
_HATCHES = {"A": "", "B": "//", "m": "xx"}
_TASK_LOOKS = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))


def parameters_by_module(model: nn.Module) -> pd.DataFrame:
    """One row a kind of adapted module (q_proj, …): how many there are, (out, in), and the numbers in W0, A, B and m.

    Counts are summed over all modules of the kind. Raises ValueError if the model has no adapters.
    """
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters: attach them first")
    rows: dict[str, dict] = {}
    for name, module in modules.items():
        out_features, in_features = features_of(module.base)
        kind = name.rpartition(".")[2]
        empty = {"count": 0, "out": out_features, "in": in_features, "W0": 0, "A": 0, "B": 0, "m": 0}
        row = rows.setdefault(kind, empty)
        row["count"] += 1
        row["W0"] += out_features * in_features
        for part, attribute in (("A", "lora_A"), ("B", "lora_B"), ("m", "magnitude")):
            parameter = getattr(module, attribute, None)
            row[part] += 0 if parameter is None else parameter.numel()
    table = pd.DataFrame([{"module": kind} | row for kind, row in rows.items()])
    table["trained of W0 (%)"] = 100 * (table["A"] + table["B"] + table["m"]) / table["W0"]
    return table


def parameter_bars(table: pd.DataFrame, title: str) -> Figure:
    """A bar for each kind of module: the numbers in A, B and m one on the other. `table`: of `parameters_by_module`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        places, left = np.arange(len(table)), np.zeros(len(table))
        for part, colour in PARTS.items():
            values = table[part].to_numpy() / 1e6
            axes.barh(places, values, 0.65, left, color=colour, ec="black", lw=0.5, hatch=_HATCHES[part], label=part)
            left += values
        for place, row in zip(places, table.to_dict("records"), strict=True):
            share = 100 * row["m"] / (row["A"] + row["B"] + row["m"])
            axes.text(left[place], place, f" m: {share:.1f} %", va="center", fontsize=8)
        axes.set_yticks(places, table["module"])
        axes.invert_yaxis()
        axes.set(xlabel="trained parameters (millions)", title=title, xlim=(0, 1.15 * left.max()))
        axes.legend(frameon=False, loc="upper right")
    return figure


def parameter_bars_alt(table: pd.DataFrame, title: str) -> str:
    """Alt text of `parameter_bars`: every part of every bar."""
    parts = [f"{r['module']}: A {r['A']:,}, B {r['B']:,}, m {r['m']:,}" for r in table.to_dict("records")]
    return f"Trained parameters by kind of module, {title}. {'; '.join(parts)}."


def length_curves(lengths: Mapping[str, Sequence[int]], cutoff: int) -> Figure:
    """Share of prompts longer than so many tokens, a line for each task; the cut-off dashed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for (task, values), (colour, line) in zip(lengths.items(), _TASK_LOOKS, strict=False):
            ordered = np.sort(np.asarray(values))
            share = 100 * (1 - np.arange(1, len(ordered) + 1) / len(ordered))
            x, y = np.concatenate([[0], ordered]), np.concatenate([[100], share])
            axes.step(x, y, where="post", color=colour, ls=line, lw=1.8, label=TASK_NAMES.get(task, task))
        axes.axvline(cutoff, color="black", ls="--", lw=1)
        axes.text(cutoff, 101, f" cut-off {cutoff}", va="bottom", fontsize=8)
        axes.set(xlabel="tokens of prompt and answer", ylabel="longer than this (%)", ylim=(0, 112), xlim=(0, None))
        axes.legend(frameon=False, loc="center right")
    return figure


def length_curves_alt(lengths: Mapping[str, Sequence[int]], cutoff: int) -> str:
    """Alt text of `length_curves`: for each task the median, the longest, and the share past the cut-off."""
    parts = []
    for task, values in lengths.items():
        values = np.asarray(values)
        parts.append(
            f"{TASK_NAMES.get(task, task)}: median {np.median(values):.0f} tokens, longest {values.max()}, "
            f"{100 * np.mean(values > cutoff):.1f} % longer than {cutoff}"
        )
    return f"Share of prompts longer than a number of tokens. {'; '.join(parts)}."
