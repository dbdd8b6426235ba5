"""Claims tested on the mini-world's recorded runs: another model and other data, but several seeds and every answer."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from dora_lab.claims.ledger import NotHere, Outcome, verdict_by, verdict_of
from dora_lab.comparisons import by_seed, corrected_wording, difference_p_value, holm, macro_difference, win_tie_loss
from dora_lab.files import read_lines
from dora_lab.geometry_figures import correlations_by_seed, geometry_correlations
from dora_lab.pipeline import RECORDED, answers_of, of_profile
from dora_lab.profiles import load_profile
from dora_lab.records import RunRecord, read_records, run_folder
from dora_lab.statistics import (
    Interval,
    draws_of,
    in_points,
    mean_of_draws,
    paired_difference,
    paired_draws,
    paired_scores,
    seed_interval,
    wording,
)
from dora_lab.tables import METHOD_NAMES, TASK_NAMES

PROFILE = "mini"
Answers = dict[str, dict[int, dict[str, bool]]]  # task -> seed -> {example id: answered right}


def ahead_on_every_task(claimed: Mapping[str, Any]) -> Outcome:
    """DoRA minus LoRA on each task, with Holm's correction over them; a loss on one task contradicts the claim."""
    dora, lora = _answers("dora", load_profile(PROFILE).rank), _answers("lora", load_profile(PROFILE).rank)
    draws = {task: paired_draws(dora[task], lora[task]) for task in dora}
    adjusted = holm({task: difference_p_value(one) for task, one in draws.items()})
    found = {task: one.interval() for task, one in draws.items()}
    wins, ties, losses = win_tie_loss(corrected_wording(found, adjusted, claimed["level"]).values())
    parts = [f"{TASK_NAMES[task]} {in_points(one)} points, p {adjusted[task]:.2f}" for task, one in found.items()]
    number = f"{wins} won, {ties} not told apart, {losses} lost: {'; '.join(parts)}"
    verdict = "holds" if wins == len(found) else "does not hold" if losses else "depends"
    return Outcome(verdict, number, _what(found))


def ahead_on_average(claimed: Mapping[str, Any]) -> Outcome:
    """The primary comparison: macro-average of DoRA minus LoRA."""
    rank = load_profile(PROFILE).rank
    return _average(_answers("dora", rank), _answers("lora", rank), f"rank {rank} each")


def ahead_at_low_ranks(claimed: Mapping[str, Any]) -> Outcome:
    """DoRA's lead at the lowest recorded rank minus its lead at the highest, over the same seeds and questions.

    The claim holds if there is a lead at the lowest rank and it is the larger one.
    """
    dora, lora = ({rank: _answers(method, rank) for rank in claimed["ranks"]} for method in ("dora", "lora"))
    draws: dict[int | str, list] = defaultdict(list)
    for place, task in enumerate(lora[claimed["ranks"][0]]):
        seeds = sorted(set.intersection(*(set(one[rank][task]) for one in (dora, lora) for rank in claimed["ranks"])))
        leads = {rank: paired_scores(dora[rank][task], lora[rank][task], seeds) for rank in claimed["ranks"]}
        first, second = leads.values()  # (seeds, items) each
        for name, scores in (leads | {"change": first - second}).items():
            draws[name].append(draws_of(scores, bootstrap_seed=place))
    found = {name: mean_of_draws(own).interval() for name, own in draws.items()}
    change = found.pop("change")
    leading = wording(found[claimed["ranks"][0]]) == "ahead"
    verdict = {"ahead": "holds" if leading else "depends", "behind": "does not hold"}.get(wording(change), "depends")
    leads = [f"rank {rank} {in_points(one)}" for rank, one in found.items()]
    number = f"{in_points(change)} points larger: {wording(change)}; {', '.join(leads)}"
    return Outcome(verdict, number, f"{_what(found)}, {_rates()}")


def half_the_rank(claimed: Mapping[str, Any]) -> Outcome:
    """DoRA at half of LoRA's rank against LoRA: macro-average."""
    low, high = claimed["ranks"]
    return _average(
        _answers("dora", low), _answers("lora", high), f"DoRA at rank {low}, LoRA at rank {high}, {_rates()}"
    )


def geometry(claimed: Mapping[str, Any]) -> Outcome:
    """The sign of the correlation of ΔD with ΔM of query weights, task by task."""
    method, said, parts = claimed["method"], [], []
    supports, contradicts = ("ahead", "behind") if claimed["correlation"] > 0 else ("behind", "ahead")
    for task, rows in _geometry().items():
        own = geometry_correlations(rows).query("module == 'q_proj'").set_index("method").loc[method]
        parts.append(f"{TASK_NAMES[task]} {own['correlation']:+.2f} ({own['low']:+.2f} to {own['high']:+.2f})")
        said.append(wording(Interval(own["correlation"], own["low"], own["high"])))
    verdict = verdict_by(said, supports, contradicts)
    return Outcome(verdict, "; ".join(parts), f"query weights of recorded {METHOD_NAMES[method]} runs, mini-world")


def more_like_full(claimed: Mapping[str, Any]) -> Outcome:
    """Whether DoRA's correlation lies nearer to full fine-tuning's than LoRA's does, seed by seed, task by task.

    Distances are taken on Fisher's scale, artanh r.
    """
    return _by_seed(
        lambda z: abs(z["lora"] - z["full"]) - abs(z["dora"] - z["full"]),
        np.arctanh,
        "nearer by {:+.2f} ({:+.2f} to {:+.2f})",
        "distance of artanh r of query weights from full fine-tuning's",
    )


def varies_more(claimed: Mapping[str, Any]) -> Outcome:
    """How much of ΔM's variance a line in ΔD leaves open, 1 - r²: one method's share minus another's, seed by seed."""
    first, second = claimed["more"], claimed["less"]
    return _by_seed(
        lambda open_share: open_share[first] - open_share[second],
        lambda r: 1 - r**2,
        "{:+.2f} ({:+.2f} to {:+.2f})",
        f"1 − r² of query weights, {METHOD_NAMES[first]} minus {METHOD_NAMES[second]}",
    )


def variance_nearer_to_full(claimed: Mapping[str, Any]) -> Outcome:
    """Whether DoRA's share 1 - r² lies nearer to full fine-tuning's than LoRA's does; beyond it is no nearer."""
    return _by_seed(
        lambda open_share: abs(open_share["lora"] - open_share["full"]) - abs(open_share["dora"] - open_share["full"]),
        lambda r: 1 - r**2,
        "nearer by {:+.2f} ({:+.2f} to {:+.2f})",
        "distance of 1 − r² of query weights from full fine-tuning's",
    )


def _by_seed(difference: Callable[[dict], float], scale: Callable, words: str, measured: str) -> Outcome:
    """Of every task a difference between methods' correlations, with Student's t limits over the common seeds."""
    said, parts, counts = [], [], []
    for task, rows in _geometry().items():
        found = {method: correlations_by_seed(rows, method, "q_proj") for method in ("full", "lora", "dora")}
        seeds = sorted(set.intersection(*(set(own) for own in found.values())))
        values = [difference({method: float(scale(own[s])) for method, own in found.items()}) for s in seeds]
        one = seed_interval(values)
        said.append(wording(one))
        counts.append(len(seeds))
        parts.append(f"{TASK_NAMES[task]} {words.format(one.estimate, one.low, one.high)}")
    verdict = verdict_by(said, "ahead", "behind")
    return Outcome(verdict, "; ".join(parts), f"{measured}, recorded mini-world runs, {min(counts)} seeds")


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
    parts = [f"{TASK_NAMES[task]} {spread:.1f} against {lead:.1f}" for task, (spread, lead) in widest.items()]
    verdict = verdict_of(spread > lead for spread, lead in widest.values())
    return Outcome(verdict, f"spread of LoRA's seeds against the difference, points: {'; '.join(parts)}", _what({}))


def one_run_each(claimed: Mapping[str, Any]) -> Outcome:
    """How often one pair of runs by itself would have been called a win, for DoRA and for LoRA, by exact McNemar.

    One run is enough on a task only if every seed would have said the same.
    """
    rank = load_profile(PROFILE).rank
    dora, lora = _answers("dora", rank), _answers("lora", rank)
    parts, enough = [], []
    for task in dora:
        pairs = by_seed(dora[task], lora[task]).values()
        clear = [one.difference for one in pairs if one.p_value < claimed["level"]]
        won, lost = sum(one > 0 for one in clear), sum(one < 0 for one in clear)
        enough.append(max(won, lost) == len(pairs))
        span = f"{100 * min(one.difference for one in pairs):+.1f} to {100 * max(one.difference for one in pairs):+.1f}"
        parts.append(f"{TASK_NAMES[task]} {won} seeds for DoRA, {lost} for LoRA of {len(pairs)} ({span} points)")
    return Outcome(verdict_of(enough), "; ".join(parts), _what({}) + ", exact McNemar a seed")


def full_is_ahead(claimed: Mapping[str, Any]) -> Outcome:
    """Full fine-tuning minus LoRA, task by task, over their common seeds."""
    full, lora = _answers("full", None), _answers("lora", load_profile(PROFILE).rank)
    found = {task: paired_difference(full[task], lora[task]) for task in full}
    said = [wording(one) for one in found.values()]
    wins, ties, losses = win_tie_loss(said)
    verdict = verdict_by(said, "ahead", "behind")
    parts = [f"{TASK_NAMES[task]} {in_points(one)} points" for task, one in found.items()]
    return Outcome(verdict, f"{wins} won, {ties} not told apart, {losses} lost: {'; '.join(parts)}", _what(found))


def _average(first: Answers, second: Answers, how: str) -> Outcome:
    found = macro_difference(first, second)
    verdict = verdict_by([wording(found)], "ahead", "behind")
    return Outcome(verdict, f"{in_points(found)} points: {wording(found)}", f"{_what({0: found})}, {how}")


def _rates() -> str:
    return f"learning rates chosen at rank {load_profile(PROFILE).rank}"


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
