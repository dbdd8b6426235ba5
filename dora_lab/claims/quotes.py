"""Claims about published numbers: quotations, averages, and what the printed figures themselves say."""

from collections.abc import Mapping
from typing import Any

from dora_lab.claims.ledger import Outcome, verdict_by, verdict_of
from dora_lab.statistics import wilson_interval
from dora_lab.tables import METHOD_NAMES, PAPER, REPORT, TASK_NAMES, published_accuracy, read_published

README = "NVlabs/DoRA README"
_TABLES = {PAPER: "Table 1", README: "first results table"}


def quoted(claimed: Mapping[str, Any]) -> Outcome:
    """One number of the report's "Paper's" rows against the paper and the authors' README."""
    method, task = claimed["method"], claimed["task"]
    said = reported("Paper's", method)[task]
    paper, readme = _printed(PAPER, method)[task], _printed(README, method)[task]
    equal = [said == paper, said == readme]
    values = _printed(PAPER, method)
    others = [TASK_NAMES[name] for name in TASK_NAMES if values[name] == said]
    number = f"quoted {said}; paper {paper}, README {readme}"
    if not any(equal) and others:
        number += f"; {said} is the paper's value for {', '.join(others)}"
    return Outcome(verdict_of(equal), number, "the printed tables: paper (version 6), authors' README, report")


def averages(claimed: Mapping[str, Any]) -> Outcome:
    """Whether a printed average is the mean of the tasks printed beside it, to a digit."""
    rows = [row["accuracy_pct"] for row in read_published()["rows"] if "average" in row["accuracy_pct"]]
    means = [sum(row[task] for task in TASK_NAMES) / len(TASK_NAMES) for row in rows]
    right = [abs(mean - row["average"]) <= 0.05 + 1e-9 for mean, row in zip(means, rows, strict=True)]
    furthest = max(abs(mean - row["average"]) for mean, row in zip(means, rows, strict=True))
    number = f"{sum(right)} of {len(right)} rows; furthest off by {furthest:.2f} points"
    return Outcome(verdict_of(right), number, "printed tables")


def average_gain(claimed: Mapping[str, Any]) -> Outcome:
    """DoRA's lead in the average over eight tasks, from the paper's table and from the authors' README."""
    gains = [_printed(source, "dora")["average"] - _printed(source, "lora")["average"] for source in _TABLES]
    equal = [abs(gain - claimed["points"]) < 0.05 for gain in gains]
    number = f"{gains[0]:+.1f} points by the paper, {gains[1]:+.1f} by the README"
    return Outcome(verdict_of(equal), number, "LLaMA-7B rows of the printed tables, one run each")


def similar(claimed: Mapping[str, Any]) -> Outcome:
    """Whether the report's accuracy is within a margin of the paper's, for each method and task named.

    Shown to be within it, or beyond it, by two one-sided tests at 5 %: the 90 % interval lies on one side whole.
    """
    margin, said, parts = claimed["within_points"], [], []
    for task, questions in claimed["questions"].items():
        for method in ("lora", "dora"):
            own, paper = reported("Our", method)[task], _printed(PAPER, method)[task]
            limits = wilson_interval(round(own / 100 * questions), questions, level=0.90)
            low, high = 100 * limits.low - paper, 100 * limits.high - paper
            inside, beyond = -margin < low and high < margin, high < -margin or margin < low
            said.append("similar" if inside else "not similar" if beyond else "open")
            parts.append(f"{METHOD_NAMES[method]} {TASK_NAMES[task]} {low:+.1f} to {high:+.1f}: {said[-1]}")
    verdict = verdict_by(said, "similar", "not similar")
    return Outcome(verdict, "; ".join(parts), "printed accuracies, report minus paper, Wilson's 90 % intervals")


def all_lower(claimed: Mapping[str, Any]) -> Outcome:
    """Whether every accuracy of the report is below the paper's."""
    gaps = {
        (method, task): reported("Our", method)[task] - _printed(PAPER, method)[task]
        for method in ("lora", "dora")
        for task in claimed["tasks"]
    }
    lower = [gap < 0 for gap in gaps.values()]
    number = ", ".join(f"{METHOD_NAMES[method]} {TASK_NAMES[task]} {gap:+.1f}" for (method, task), gap in gaps.items())
    return Outcome(verdict_of(lower), number + " points", "printed accuracies")


def four_endings(claimed: Mapping[str, Any]) -> Outcome:
    """Whether the task of four endings scores below the tasks of two answers wherever both are trained properly."""
    rows = [row["accuracy_pct"] for row in read_published()["rows"] if row["where"] == "Table 1"]
    below = {two: sum(row["hellaswag"] < row[two] for row in rows) for two in ("boolq", "winogrande")}
    settled = [count == len(rows) for count in below.values()]
    verdict = verdict_of(settled)
    number = ", ".join(f"below {TASK_NAMES[task]} in {count} of {len(rows)} rows" for task, count in below.items())
    return Outcome(verdict, f"HellaSwag is {number}", "all rows of the paper's Table 1, the same four endings")


def _printed(source: str, method: str) -> dict[str, float]:
    return published_accuracy(read_published(), source, _TABLES[source], method)[0]


def reported(whose: str, method: str) -> dict[str, float]:
    where = f"Figure 2, row '{whose} {METHOD_NAMES[method]}'"
    return published_accuracy(read_published(), REPORT, where, method)[0]
