"""Runs of hybrids beside those of LoRA and DoRA: accuracy with what was trained for it, paired differences, a verdict.

Accuracies are percent, differences percentage points. A run is called by its variant, a plain one by method and rank.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dora_lab.adapter_config import layer_of
from dora_lab.comparison_tables import Answers, both
from dora_lab.comparisons import difference_p_value, holm, macro_draws
from dora_lab.records import RunRecord
from dora_lab.specs import RunSpec
from dora_lab.statistics import Interval, seed_interval
from dora_lab.tables import METHOD_NAMES, TASK_NAMES, kind_name, markdown_table

SIGNIFICANT = 0.05
ONE_SEED = "one seed, nothing said of methods"


@dataclass(frozen=True)
class Point:
    """One kind of run on one task: percent right by seed, for so many trained parameters."""

    name: str
    task: str
    parameters: int
    accuracy: Mapping[int, float]
    method: str
    is_variant: bool

    @property
    def interval(self) -> Interval:
        """Mean with 95 % limits over seeds."""
        return seed_interval(list(self.accuracy.values()))


def run_name(spec: RunSpec) -> str:
    """The variant, or method and rank."""
    return spec.variant or kind_name(spec.method, spec.rank)


def points_of(records: Iterable[RunRecord], seeds: Sequence[int]) -> list[Point]:
    """A point for each kind of run and task, of the test runs with these seeds, in the order of their parameters.

    Raises ValueError if one kind's runs trained different numbers of parameters.
    """
    found: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for record in records:
        if record.spec.split == "test" and record.spec.seed in seeds:
            found[run_name(record.spec), record.spec.task].append(record)
    points = []
    for (name, task), own in found.items():
        counts = {record.result.trainable_parameters for record in own}
        if len(counts) > 1:
            raise ValueError(f"runs named {name!r} on {task} train {sorted(counts)} parameters: they are not one kind")
        accuracy = {r.spec.seed: 100 * r.result.accuracy for r in sorted(own, key=lambda r: r.spec.seed)}
        points.append(Point(name, task, counts.pop(), accuracy, own[0].spec.method, own[0].spec.variant is not None))
    return sorted(points, key=lambda point: (point.parameters, point.name, list(TASK_NAMES).index(point.task)))


def accuracy_table(points: Sequence[Point]) -> pd.DataFrame:
    """One row a kind of run: trained parameters, `accuracy ± half width` on every task, their mean, seeds."""
    tasks = [task for task in TASK_NAMES if any(point.task == task for point in points)]
    rows = []
    for name in dict.fromkeys(point.name for point in points):
        own = {point.task: point for point in points if point.name == name}
        row = {"run": name, "parameters": next(iter(own.values())).parameters}
        for task in tasks:
            row[TASK_NAMES[task]] = _cell(own[task].interval) if task in own else "not run"
        means = [own[task].interval.estimate for task in tasks if task in own]
        row["mean"] = f"{sum(means) / len(means):.1f}" if len(means) == len(tasks) else ""
        rows.append(row | {"seeds": min(len(point.accuracy) for point in own.values())})
    return pd.DataFrame(rows)


def contrasts(variants: Iterable[str], rank: int) -> dict[str, tuple[str, str]]:
    """{what is asked: (first, second)}: the comparisons of chapter 14, written down while the first seed was running.

    Every variant against DoRA on every module at the profile's rank; the rule's choice against its control and against
    a uniform rank at its budget; LoRA from PiSSA's start against LoRA.
    """
    plain = kind_name("dora", rank)
    pairs = {f"{name} minus {plain}": (name, plain) for name in variants}
    asked = (("gradient", "shuffled"), ("gradient", kind_name("dora", 1)), ("lora-pissa", kind_name("lora", rank)))
    return pairs | {f"{first} minus {second}": (first, second) for first, second in asked if first in variants}


def contrast_table(answers: Answers, pairs: Mapping[str, tuple[str, str]], tasks: Sequence[str]) -> pd.DataFrame:
    """One row a comparison: macro-average over `tasks` of the paired difference, its 95 % limits, p, p after Holm.

    `said`, "higher", "lower" or "no difference shown", goes by p after Holm's correction over all comparisons: at least
    `SIGNIFICANT` is none. With one common seed it is two trained models that differ: p is empty, and nothing is said of
    methods. A comparison that lacks runs on a task is left out.
    """
    rows = []
    for label, (first, second) in pairs.items():
        one, other = both(answers, first, second)
        if set(one) == set(tasks):
            draws = macro_draws(one, other)
            found = draws.interval()
            row = {"comparison": label, "seeds": found.seeds, "points": 100 * found.estimate}
            row |= {"low": 100 * found.low, "high": 100 * found.high}
            p = difference_p_value(draws) if found.seeds > 1 else math.nan
            rows.append(row | {"p": p, "p (Holm)": math.nan, "said": ONE_SEED})
    adjusted = holm({row["comparison"]: row["p"] for row in rows if row["seeds"] > 1})
    for row in rows:
        if row["comparison"] in adjusted:
            row["p (Holm)"] = adjusted[row["comparison"]]
            side = "higher" if row["points"] > 0 else "lower"
            row["said"] = side if row["p (Holm)"] < SIGNIFICANT else "no difference shown"
    return pd.DataFrame(rows, columns=["comparison", "seeds", "points", "low", "high", "p", "p (Holm)", "said"])


def contrast_intervals(table: pd.DataFrame) -> dict[str, Interval]:
    """The rows of `contrast_table` as fractions, for `comparison_figures.difference_lines`."""
    return {
        row["comparison"]: Interval(row["points"] / 100, row["low"] / 100, row["high"] / 100, seeds=row["seeds"])
        for row in table.to_dict("records")
    }


def verdicts(table: pd.DataFrame) -> list[str]:
    """What the comparisons come to, in sentences: each with its numbers, whatever the side it falls on."""
    lines = []
    for row in table.to_dict("records"):
        tested = "" if row["said"] == ONE_SEED else f"{row['seeds']} seeds, p after Holm {row['p (Holm)']:.3f}: "
        limits = f"95 % interval {row['low']:+.1f} to {row['high']:+.1f}"
        lines.append(f"{row['comparison']}: {row['points']:+.1f} points, {limits}, {tested}{row['said']}.")
    said = table["said"][table["said"] != ONE_SEED]
    if len(said):
        up, down = (said == "higher").sum(), (said == "lower").sum()
        lines.append(f"Of {len(said)} comparisons {up} came out higher, {down} lower, {len(said) - up - down} neither.")
    return lines


def write_hybrids(points: Sequence[Point], table: pd.DataFrame, folder: Path, source: str) -> Path:
    """Write `hybrids.md`: the table of accuracies and the verdicts. `source` says which runs these are."""
    shown = accuracy_table(points)
    head = (
        f"{source}. Accuracy in percent, mean ± half the 95 % interval over seeds (Student's t); `parameters` are the "
        "trained ones. Differences are macro-averages over the tasks, paired by seed and question.\n"
    )
    page = f"# Hybrids, accuracy for what is trained\n\n{head}\n{markdown_table(shown, words=1)}\n\n" + "".join(
        f"- {v}\n" for v in verdicts(table)
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hybrids.md").write_text(page, encoding="utf-8")
    return folder / "hybrids.md"


def method_table(methods: Mapping[str, str]) -> pd.DataFrame:
    """Layers × kinds of module: the method of each, for {module: method}."""
    rows: dict[int, dict[str, str]] = defaultdict(dict)
    for name, method in methods.items():
        rows[layer_of(name)][name.rpartition(".")[2]] = "DoRA" if method == "dora" else _SHORT.get(method, method)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


_SHORT = {"lora": METHOD_NAMES["lora"], "dora-magnitude": "m"}


def _cell(interval: Interval) -> str:
    half = interval.half_width
    return f"{interval.estimate:.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
