"""Claims tested by putting faults into the mini-world's runs, one at a time (`dora_lab.faults`)."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from dora_lab.claims.ledger import NotHere, Outcome, verdict_by
from dora_lab.faults import PROFILE, Effect, effects, read_answers, uneven
from dora_lab.profiles import load_profile
from dora_lab.statistics import in_points, wording
from dora_lab.tables import METHOD_NAMES, TASK_NAMES


def lowers_accuracy(claimed: Mapping[str, Any]) -> Outcome:
    """What one fault does to one method's accuracy, task by task; decided by several seeds on every task alone."""
    fault, method = claimed["fault"], claimed["method"]
    own = [one for one in _effects() if one.fault == fault]
    if not own:
        raise NotHere(f"no runs of the fault {fault} are recorded: `dora-lab reproduce --profile mini-faults`")
    enough = len(own) == len(load_profile(PROFILE).tasks) and all(len(one.seeds) > 1 for one in own)
    said = [wording(one.change[method]) for one in own]
    verdict = verdict_by(said, "behind", "ahead") if enough else "depends"
    parts = [f"{TASK_NAMES[one.task]} {in_points(one.change[method])} points{one.only}" for one in own]
    return Outcome(verdict, "; ".join(parts), f"recorded {METHOD_NAMES[method]} runs, mini-world, {_seeds(own)}")


def comparison_stays(claimed: Mapping[str, Any]) -> Outcome:
    """Whether any fault, alone, moves DoRA minus LoRA, with Holm's correction over faults and tasks.

    That none does is shown where all limits lie within the margin.
    """
    several = [one for one in _effects() if len(one.seeds) > 1]
    if not several:
        raise NotHere("no fault has runs of several seeds: `dora-lab reproduce --profile mini-faults`")
    moved = [(one, p) for one, p in uneven(several)]
    clear = [p < claimed["level"] for _, p in moved]
    parts = [f"{one.fault} on {TASK_NAMES[one.task]} {in_points(one.turn)} points, p {p:.2g}" for one, p in moved]
    number = f"moved in {len(moved)} of {len(several)} cases, {sum(clear)} after Holm"
    margin = claimed["within_points"] / 100
    still = all(-margin < one.turn.low and one.turn.high < margin for one in several)
    verdict = "does not hold" if any(clear) else "holds" if still else "depends"
    return Outcome(verdict, "; ".join([number, *parts]), f"recorded runs with a fault, mini-world, {_seeds(several)}")


@cache
def _effects() -> list[Effect]:
    found = effects(read_answers())
    if not found:
        raise NotHere("no runs of profile mini-faults are recorded: `dora-lab reproduce --profile mini-faults`")
    return found


def _seeds(found: list[Effect]) -> str:
    counts = sorted({len(one.seeds) for one in found})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{span} seed" + "s" * (counts[-1] > 1)
