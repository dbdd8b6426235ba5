"""Claims tested on the mini-world's recorded runs: another model and other data, but several seeds and every answer."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from dora_lab.claims.ledger import NotHere, Outcome
from dora_lab.comparisons import by_seed, difference_p_value, holm, macro_difference, win_tie_loss
from dora_lab.files import read_lines
from dora_lab.geometry_figures import geometry_correlations
from dora_lab.pipeline import RECORDED, answers_of, of_profile
from dora_lab.profiles import load_profile
from dora_lab.records import RunRecord, read_records, run_folder
from dora_lab.statistics import Interval, paired_difference, paired_draws, seed_interval, wording
from dora_lab.tables import METHOD_NAMES, TASK_NAMES

PROFILE = "mini"
Answers = dict[str, dict[int, dict[str, bool]]]  # task -> seed -> {example id: answered right}


def ahead_on_every_task(claimed: Mapping[str, Any]) -> Outcome:
    """DoRA minus LoRA on each task, with Holm's correction over them."""
    dora, lora = _answers("dora", load_profile(PROFILE).rank), _answers("lora", load_profile(PROFILE).rank)
    draws = {task: paired_draws(dora[task], lora[task]) for task in dora}
    adjusted = holm({task: difference_p_value(one) for task, one in draws.items()})
    found = {task: one.interval() for task, one in draws.items()}
    wins, ties, losses = win_tie_loss(found.values())
    shown = [wording(found[task]) == "ahead" and adjusted[task] < 0.05 for task in found]
    parts = [f"{TASK_NAMES[task]} {_points(one)}, p {adjusted[task]:.2f}" for task, one in found.items()]
    number = f"{wins} won, {ties} not told apart, {losses} lost: {'; '.join(parts)}"
    return Outcome("holds" if all(shown) else _undecided(losses == len(found)), number, _what(found))


def ahead_on_average(claimed: Mapping[str, Any]) -> Outcome:
    """The primary comparison: macro-average of DoRA minus LoRA."""
    rank = load_profile(PROFILE).rank
    return _average(_answers("dora", rank), _answers("lora", rank), f"rank {rank} each")


def ahead_at_low_ranks(claimed: Mapping[str, Any]) -> Outcome:
    """Whether DoRA's lead is larger at the lowest recorded rank than at the highest."""
    low, high = claimed["ranks"]
    parts, leads = [], {}
    for rank in (low, high):
        leads[rank] = macro_difference(_answers("dora", rank), _answers("lora", rank))
        parts.append(f"rank {rank}: {_points(leads[rank])}")
    apart = leads[low].low > leads[high].high, leads[low].high < leads[high].low
    verdict = "holds" if apart[0] and wording(leads[low]) == "ahead" else _undecided(apart[1])
    return Outcome(verdict, "; ".join(parts), _what(leads))


def half_the_rank(claimed: Mapping[str, Any]) -> Outcome:
    """DoRA at half of LoRA's rank against LoRA: macro-average."""
    low, high = claimed["ranks"]
    return _average(_answers("dora", low), _answers("lora", high), f"DoRA at rank {low}, LoRA at rank {high}")


def geometry(claimed: Mapping[str, Any]) -> Outcome:
    """The sign of the correlation of ΔD with ΔM of query weights, task by task."""
    method, sides, parts = claimed["method"], [], []
    for task, rows in _geometry().items():
        table = geometry_correlations(rows).query("module == 'q_proj'").set_index("method")
        own = table.loc[method]
        parts.append(f"{TASK_NAMES[task]} {own['correlation']:+.2f} ({own['low']:+.2f} to {own['high']:+.2f})")
        decided = own["low"] > 0 or own["high"] < 0
        sides.append(own["correlation"] * claimed["correlation"] > 0 if decided else None)
    verdict = (
        "holds" if all(sides) else "does not hold" if not any(side in (True, None) for side in sides) else "depends"
    )
    return Outcome(verdict, "; ".join(parts), f"query weights of recorded {METHOD_NAMES[method]} runs, mini-world")


def more_like_full(claimed: Mapping[str, Any]) -> Outcome:
    """Whether DoRA's correlation lies nearer to full fine-tuning's than LoRA's does, task by task."""
    nearer, parts = [], []
    for task, rows in _geometry().items():
        table = geometry_correlations(rows).query("module == 'q_proj'").set_index("method")["correlation"]
        apart = {method: abs(table[method] - table["full"]) for method in ("lora", "dora")}
        nearer.append(apart["dora"] < apart["lora"])
        parts.append(f"{TASK_NAMES[task]} DoRA {apart['dora']:.2f} off, LoRA {apart['lora']:.2f}")
    verdict = "holds" if all(nearer) else "depends" if any(nearer) else "does not hold"
    return Outcome(
        verdict, "; ".join(parts), "correlations of query weights, recorded mini-world runs, means over seeds"
    )


def step_time(claimed: Mapping[str, Any]) -> Outcome:
    """Time of a training step, DoRA's to LoRA's of the same task and seed, as recorded."""
    times: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    rank, device = load_profile(PROFILE).rank, ""
    for record in _records():
        if record.spec.rank == rank:
            times[record.spec.task, record.spec.seed][record.spec.method] = record.result.step_time_s
            device = record.environment["device"]
    ratios = [pair["dora"] / pair["lora"] for pair in times.values() if len(pair) == 2]
    lower, upper = np.quantile(ratios, [0.25, 0.75])
    verdict = "holds" if median(ratios) > claimed["above_ratio"] else "does not hold"
    number = f"{median(ratios):.2f} of LoRA's time (half of the pairs {lower:.2f} to {upper:.2f})"
    return Outcome(verdict, number, f"{len(ratios)} pairs of recorded mini-world runs, {device}")


def seeds_fluctuate(claimed: Mapping[str, Any]) -> Outcome:
    """The spread of accuracy over seeds against DoRA's mean lead."""
    rank, widest = load_profile(PROFILE).rank, {}
    dora, lora = _answers("dora", rank), _answers("lora", rank)
    for task in dora:
        accuracies = [np.mean(list(answers.values())) for answers in lora[task].values()]
        widest[task] = (100 * (max(accuracies) - min(accuracies)), 100 * abs(_mean(dora[task]) - _mean(lora[task])))
    larger = [spread > lead for spread, lead in widest.values()]
    parts = [f"{TASK_NAMES[task]} {spread:.1f} against {lead:.1f}" for task, (spread, lead) in widest.items()]
    verdict = "holds" if all(larger) else "depends" if any(larger) else "does not hold"
    return Outcome(verdict, f"spread of LoRA's seeds against the difference, points: {'; '.join(parts)}", _what({}))


def one_run_each(claimed: Mapping[str, Any]) -> Outcome:
    """How often one pair of runs by itself would have been called a win, for DoRA and for LoRA, by exact McNemar."""
    rank = load_profile(PROFILE).rank
    dora, lora = _answers("dora", rank), _answers("lora", rank)
    parts, against = [], []
    for task in dora:
        pairs = by_seed(dora[task], lora[task]).values()
        clear = [one.difference for one in pairs if one.p_value < claimed["level"]]
        won, lost = sum(one > 0 for one in clear), sum(one < 0 for one in clear)
        against.append(won > 0 and lost > 0)
        span = f"{100 * min(one.difference for one in pairs):+.1f} to {100 * max(one.difference for one in pairs):+.1f}"
        parts.append(f"{TASK_NAMES[task]} {won} seeds for DoRA, {lost} for LoRA of {len(pairs)} ({span} points)")
    return Outcome("does not hold" if any(against) else "holds", "; ".join(parts), _what({}) + ", exact McNemar a seed")


def full_is_ahead(claimed: Mapping[str, Any]) -> Outcome:
    """Full fine-tuning minus LoRA, task by task, over their common seeds."""
    full, lora = _answers("full", None), _answers("lora", load_profile(PROFILE).rank)
    found = {task: paired_difference(full[task], lora[task]) for task in full}
    wins, ties, losses = win_tie_loss(found.values())
    verdict = "holds" if wins == len(found) else _undecided(losses == len(found))
    parts = [f"{TASK_NAMES[task]} {_points(one)}" for task, one in found.items()]
    return Outcome(verdict, f"{wins} won, {ties} not told apart, {losses} lost: {'; '.join(parts)}", _what(found))


def _average(first: Answers, second: Answers, how: str) -> Outcome:
    found = macro_difference(first, second)
    verdict = {"ahead": "holds", "behind": "does not hold"}.get(wording(found), "depends")
    return Outcome(verdict, f"{_points(found)}: {wording(found)}", f"{_what({0: found})}, {how}")


def _undecided(contrary: bool) -> str:
    return "does not hold" if contrary else "depends"


def _points(one: Interval) -> str:
    return f"{100 * one.estimate:+.1f} points ({100 * one.low:+.1f} to {100 * one.high:+.1f})"


def _what(found: Mapping[Any, Interval]) -> str:
    seeds = f", {min(one.seeds for one in found.values())} seeds" if found else ""
    return f"recorded mini-world runs{seeds}"


def _mean(runs: Mapping[int, Mapping[str, bool]]) -> float:
    return seed_interval([np.mean(list(answers.values())) for answers in runs.values()]).estimate


@cache
def _records() -> list[RunRecord]:
    loaded = load_profile(PROFILE)
    records = of_profile(loaded, read_records(RECORDED / loaded.name)[0])
    if not records:
        raise NotHere(f"no run of profile {PROFILE} with its settings is recorded in data/results: `dora-lab record`")
    return records


@cache
def _answers(method: str, rank: int | None) -> Answers:
    chosen = [r for r in _records() if (r.spec.method, r.spec.rank) == (method, rank) and r.spec.split == "test"]
    found = answers_of(RECORDED, chosen)
    answers = {task: found[task, method] for task in load_profile(PROFILE).tasks if (task, method) in found}
    if len(answers) < len(load_profile(PROFILE).tasks):
        raise NotHere(f"no recorded run of {METHOD_NAMES[method]}, rank {rank}, on every task of profile {PROFILE}")
    return answers


@cache
def _geometry() -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {task: [] for task in load_profile(PROFILE).tasks}
    for record in _records():
        file = run_folder(RECORDED, record.spec) / "geometry.jsonl"
        if record.spec.method != "dora-magnitude" and record.spec.rank in (None, load_profile(PROFILE).rank):
            if file.is_file():
                own = {"method": record.spec.method, "seed": record.spec.seed}
                rows[record.spec.task] += [own | row for row in read_lines(file)]
    if not all(rows.values()):
        raise NotHere("no geometry is recorded for every task")
    return rows
