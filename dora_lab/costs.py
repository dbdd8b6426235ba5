"""The benchmark's table and figures, made from the JSON that `dora-lab bench` writes."""

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dora_lab.bench import EVALUATED, Setting
from dora_lab.figures import METHOD_COLOURS, STYLE
from dora_lab.files import write_text
from dora_lab.tables import markdown_table

NAMES = {
    "base": "frozen base",
    "lora": "LoRA",
    "lora-peft": "LoRA, PEFT",
    "dora": "DoRA",
    "dora-reference": "DoRA, plain",
    "dora-peft": "DoRA, PEFT",
    "dora-peft-sped-up": "DoRA, PEFT sped up",
    "dora-merged": "DoRA, merged",
}
LOOKS = {  # colour and marker
    "lora-peft": (METHOD_COLOURS["lora"], "s"),
    "dora": (METHOD_COLOURS["dora"], "o"),
    "dora-reference": ("#56B4E9", "^"),
    "dora-peft": ("#D55E00", "D"),
    "dora-peft-sped-up": (METHOD_COLOURS["dora-magnitude"], "v"),
    "dora-merged": (METHOD_COLOURS["full"], "P"),
}
QUANTITIES = {"step": "training step", "evaluation": "evaluation", "saved": "saved bytes", "peak": "peak bytes"}


def read_costs(path: str | Path) -> dict:
    """What `bench` wrote. Raises ValueError, with what to do, for a file that is missing or of another kind."""
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"no benchmark at {path}: run `dora-lab bench {path}`") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken JSON ({error}): delete it and run `dora-lab bench {path}`") from None
    if not isinstance(found, dict) or not {"environment", "rows", "norms"} <= set(found):
        raise ValueError(f"{path} is no benchmark of this version: run `dora-lab bench {path}` again")
    return found


def cost_ratios(found: Mapping) -> pd.DataFrame:
    """One row a setting and variant: each quantity divided by LoRA's of the same setting.

    `step`, `evaluation`: median over turns of the ratio to LoRA's time in the same turn, with its quartiles in
    `…_low` and `…_high`. `saved`, `peak`: ratios of bytes. `norms_per_step`: count. NaN where not measured.
    """
    rows = []
    loras = {str(row["setting"]): row for row in found["rows"] if row["variant"] == "lora"}
    for row in found["rows"]:
        lora = loras[str(row["setting"])]
        ratios = {"setting": Setting(**row["setting"]).name, "variant": row["variant"]}
        for kind in ("step", "evaluation"):
            for end in ("", "_low", "_high"):
                ratios[kind + end] = row.get(f"{kind}_to_lora{end}", np.nan)
        for kind in ("saved", "peak"):
            own = row.get(f"{kind}_bytes")
            ratios[kind] = own / lora[f"{kind}_bytes"] if own else np.nan
        rows.append(ratios | {"norms_per_step": row.get("norms_per_step")})
    return pd.DataFrame(rows)


def cost_table(found: Mapping) -> pd.DataFrame:
    """`cost_ratios` as text to read: one row a setting and variant, times with their quartiles."""
    rows = []
    for row in cost_ratios(found).itertuples():
        cells = {"setting": row.setting, "variant": NAMES[row.variant]}
        for kind in ("step", "evaluation"):
            value, low, high = (getattr(row, kind + end) for end in ("", "_low", "_high"))
            cells[QUANTITIES[kind]] = "" if np.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"
        for kind in ("saved", "peak"):
            value = getattr(row, kind)
            cells[QUANTITIES[kind]] = "" if np.isnan(value) else f"{value:.2f}"
        norms = row.norms_per_step
        cells["norms a step"] = "" if norms is None or np.isnan(norms) else f"{norms:g}"
        rows.append(cells)
    return pd.DataFrame(rows)


def measured_on(found: Mapping) -> str:
    """One line: when, on what and with which versions a benchmark was measured."""
    known = found["environment"]
    versions = ", ".join(f"{name} {known['versions'][name]}" for name in ("torch", "transformers", "peft"))
    return f"{known['date']}; {known['device']}; {known['system']}; {known['threads']} threads; {versions}"


def write_costs(found: Mapping, folder: str | Path) -> list[Path]:
    """Write costs.csv (numbers) and costs.md (text); returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = cost_table(found)
    text = [
        "# The cost of DoRA",
        "",
        "Each number is divided by LoRA's (ours) in the same setting; times: median over "
        f"{found['turns']} turns of the ratio within a turn, with quartiles.",
        "",
        f"Measured: {measured_on(found)}.",
        "",
        markdown_table(table),
    ]
    paths = [folder / "costs.csv", folder / "costs.md"]
    write_text(paths[0], cost_ratios(found).to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    write_text(paths[1], "\n".join(text) + "\n")
    return paths


def cost_dots(found: Mapping) -> Figure:
    """Step time, evaluation time and saved bytes of every variant over LoRA's, one line of dots a setting."""
    table = cost_ratios(found)
    settings = list(dict.fromkeys(table["setting"]))
    variants = [variant for variant in EVALUATED if variant in LOOKS]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.5 + 0.5 * len(settings)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 3, sharey=True)
        for axis, kind in zip(axes, ("step", "evaluation", "saved"), strict=True):
            axis.axvline(1, color="black", lw=1, ls="--")
            for index, variant in enumerate(variants):
                own = table[table["variant"] == variant].set_index("setting").reindex(settings)
                shift = 0.1 * (index - (len(variants) - 1) / 2)
                y = np.arange(len(settings)) + shift
                colour, marker = LOOKS[variant]
                if kind != "saved":
                    axis.hlines(y, own[f"{kind}_low"], own[f"{kind}_high"], color=colour, lw=1)
                axis.plot(own[kind], y, ls="", marker=marker, color=colour, ms=5, label=NAMES[variant])
            axis.set_xlabel(f"{QUANTITIES[kind]}, LoRA = 1")
            axis.grid(axis="x", lw=0.3)
        axes[0].set_yticks(range(len(settings)), settings)
        axes[0].invert_yaxis()
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(variants), frameon=False)
    return figure


def cost_dots_alt(found: Mapping) -> str:
    """Alt text of `cost_dots`: per variant the range over settings of each ratio."""
    table, parts = cost_ratios(found), []
    for variant in (variant for variant in EVALUATED if variant in LOOKS):
        own, ranges = table[table["variant"] == variant], []
        for kind in ("step", "evaluation", "saved"):
            values = own[kind].dropna()
            if len(values):
                ranges.append(f"{QUANTITIES[kind]} {values.min():.2f} to {values.max():.2f}")
        if ranges:
            parts.append(f"{NAMES[variant]}: {', '.join(ranges)}")
    return f"Costs as multiples of LoRA's, over {table['setting'].nunique()} settings. " + "; ".join(parts) + "."


def norm_lines(found: Mapping) -> Figure:
    """Time of the factored norm over the dense one against rank, one line a shape; below 1 the factored is faster."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        axis.axhline(1, color="black", lw=1, ls="--")
        colours = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00")
        for index, ((out, inn), own) in enumerate(pd.DataFrame(found["norms"]).groupby(["out", "in"])):
            look = {"color": colours[index % 5], "marker": "os^Dv"[index % 5], "ms": 5}
            axis.plot(own["rank"], own["factored_s"] / own["dense_s"], label=f"{out} x {inn}", **look)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("rank")
        axis.set_ylabel("factored / dense, seconds")
        axis.legend(title="weight (out x in)", frameon=False)
    return figure


def norm_lines_alt(found: Mapping) -> str:
    """Alt text of `norm_lines`: per shape the ratio at its lowest and highest rank."""
    parts = []
    for (out, inn), own in pd.DataFrame(found["norms"]).groupby(["out", "in"]):
        ratio = (own["factored_s"] / own["dense_s"]).to_numpy()
        ends = f"{ratio[0]:.2f} at rank {own['rank'].iloc[0]}, {ratio[-1]:.2f} at rank {own['rank'].iloc[-1]}"
        parts.append(f"{out} x {inn}: {ends}")
    return "Time of the factored norm divided by the dense one's. " + "; ".join(parts) + "."
