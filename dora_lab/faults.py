"""The report's faults in miniature: what each of them alone does to two accuracies, and to the difference of the two.

The faults are the variants of the profile `mini-faults`. Each is read against the runs that have its settings but for
what makes the fault: the plain runs, those of `mini`, or another variant (`reference`). All differences are paired by
seed and by question; where a fault was scored on fewer questions, so is its reference.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from dora_lab.comparisons import by_seed, difference_p_value, holm
from dora_lab.files import write_text
from dora_lab.pipeline import RECORDED, of_profile
from dora_lab.profiles import Profile, load_profile
from dora_lab.records import RunRecord, read_failures, read_predictions, read_records, run_folder
from dora_lab.statistics import Interval, correct_by_id, draws_together, in_points, wording
from dora_lab.tables import METHOD_NAMES, TASK_NAMES, markdown_table

PROFILE, PLAIN = "mini-faults", "mini"
METHODS = ("lora", "dora")
LEVEL = 0.05  # of McNemar's test on a single pair of runs
_BOTH = (False, True)  # without the fault, with it
Key = tuple[str | None, str, str]  # variant (None: plain), task, method


@dataclass
class Answers:
    """By variant, task and method: seed -> {example id: answered right}, seed -> ids that could not be read."""

    right: dict[Key, dict[int, dict[str, bool]]] = field(default_factory=lambda: defaultdict(dict))
    unread: dict[Key, dict[int, set[str]]] = field(default_factory=lambda: defaultdict(dict))
    failed: dict[Key, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))


@dataclass(frozen=True)
class Effect:
    """What a fault did on one task; accuracies, shares and differences are fractions.

    change: method -> accuracy with the fault minus without. lead: DoRA minus LoRA without and with the fault. turn: the
    lead with it minus the lead without, turn_p its two-sided p. accuracy, unread: (method, with the fault) -> share.
    wins: with the fault -> seeds in which McNemar's test by itself says DoRA, and in which it says LoRA. failed: method
    -> seeds whose run with the fault failed, which are in none of the numbers.
    """

    fault: str
    against: str
    task: str
    seeds: tuple[int, ...]
    items: int
    accuracy: dict[tuple[str, bool], float]
    unread: dict[tuple[str, bool], float]
    change: dict[str, Interval]
    lead: dict[bool, Interval]
    turn: Interval
    turn_p: float
    wins: dict[bool, tuple[int, int]]
    failed: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        return f"{self.fault} on {TASK_NAMES[self.task]}"

    @property
    def only(self) -> str:
        """What has to be added to every word about one seed: it is about two trained models, not about two methods."""
        return ", two runs" if len(self.seeds) == 1 else ""

    @property
    def verdict(self) -> str:
        """What the intervals say of the lead, and of its change; runs that failed are not passed over."""
        if any(self.failed.values()):
            seeds = {METHOD_NAMES[m]: ", ".join(map(str, own)) for m, own in self.failed.items() if own}
            lost = "; ".join(f"{name} failed with seeds {own}" for name, own in seeds.items())
            return f"{lost}: nothing said of those that are left"
        before, after = (_said(self.lead[faulty]) for faulty in _BOTH)
        told = before if before == after else f"{before} → {after}"
        moved = "" if not _open(self.turn) or before == after else ", the turn itself not shown"
        return told + moved + self.only


HEADING = """# The report's faults, one at a time, in the mini-world

Percent without → with the fault, then what it changes, in points with 95 % limits over seeds and questions, paired.
`against`: the runs that lack the fault alone. `turn`: DoRA − LoRA with the fault minus without.
`seeds for DoRA : LoRA`: pairs of runs that exact McNemar at 5 % would have called a win, without → with. The mini-world
is another model with other data: nothing here says how large an effect was on LLaMA-7B. `float16` has none of the loss
scaling that mixed precision has on a GPU."""


def reference(profile: Profile, fault: str) -> str | None:
    """The variant with the most of this one's settings and no others; None, the plain profile, if there is none."""
    own = profile.variants[fault].items()
    inside = [name for name, values in profile.variants.items() if values.items() < own]
    return max(inside, key=lambda name: len(profile.variants[name]), default=None)


def read_answers(runs_dir: Path = RECORDED, profile: Profile | None = None) -> Answers:
    """The test runs of the profile's variants in `runs_dir`, and its plain runs, from there or from `mini`'s folder."""
    profile = profile or load_profile(PROFILE)
    answers = Answers()
    records = [r for name in (PLAIN, profile.name) for r in read_records(Path(runs_dir) / name)[0]]
    for record in of_profile(profile, records):
        if _counts(record, profile):
            rows = read_predictions(run_folder(runs_dir, record.spec))
            key, seed = (record.spec.variant, record.spec.task, record.spec.method), record.spec.seed
            answers.right[key][seed] = correct_by_id(rows)
            answers.unread[key][seed] = {row["id"] for row in rows if not row["parsed"]}
    for failure in read_failures(Path(runs_dir) / profile.name):
        key = (failure["variant"], failure["task"], failure["method"])
        answers.failed[key][failure["seed"]] = failure["error"]
    return answers


def _counts(record: RunRecord, profile: Profile) -> bool:
    spec = record.spec
    return spec.method in METHODS and spec.rank == profile.rank and spec.split == "test"


def effects(answers: Answers, profile: Profile | None = None) -> list[Effect]:
    """One for every fault and task with a seed that both methods have, with the fault and without.

    Raises ValueError if a reference lacks questions that were asked with the fault.
    """
    profile = profile or load_profile(PROFILE)
    found = []
    for fault in profile.variants:
        for task in profile.tasks:
            effect = _effect(answers, fault, reference(profile, fault), task)
            found += [] if effect is None else [effect]
    return found


def _effect(answers: Answers, fault: str, against: str | None, task: str) -> Effect | None:
    keys = {(method, faulty): (fault if faulty else against, task, method) for method in METHODS for faulty in _BOTH}
    seeds = sorted(set.intersection(*(set(answers.right.get(key, {})) for key in keys.values())))
    if not seeds:
        return None
    items = sorted(answers.right[keys["dora", True]][seeds[0]])
    right = {place: {s: _only(answers.right[key][s], items, key) for s in seeds} for place, key in keys.items()}
    unread = {
        place: float(np.mean([len(answers.unread[key][s] & set(items)) / len(items) for s in seeds]))
        for place, key in keys.items()
    }
    score = {
        place: np.array([[runs[s][i] for i in items] for s in seeds], dtype=float)  # (seeds, items)
        for place, runs in right.items()
    }
    changes = [score[method, True] - score[method, False] for method in METHODS]  # (seeds, items) each
    leads = [score["dora", faulty] - score["lora", faulty] for faulty in _BOTH]  # (seeds, items) each
    draws = draws_together([*changes, *leads, leads[1] - leads[0]])
    found = [one.interval() for one in draws]
    return Effect(
        fault,
        against or "plain",
        task,
        tuple(seeds),
        len(items),
        {place: float(values.mean()) for place, values in score.items()},
        unread,
        dict(zip(METHODS, found[:2], strict=True)),
        dict(zip(_BOTH, found[2:4], strict=True)),
        found[4],
        difference_p_value(draws[4]),
        {faulty: _wins(right["dora", faulty], right["lora", faulty]) for faulty in _BOTH},
        {method: tuple(sorted(answers.failed.get(keys[method, True], {}))) for method in METHODS},
    )


def _only(answers: Mapping[str, bool], items: Iterable[str], key: Key) -> dict[str, bool]:
    try:
        return {item: answers[item] for item in items}
    except KeyError as missing:
        raise ValueError(
            f"the runs of {key} were not asked {missing}: compare runs of one task, split and data version"
        ) from missing


def _wins(dora: Mapping[int, Mapping[str, bool]], lora: Mapping[int, Mapping[str, bool]]) -> tuple[int, int]:
    clear = [pairs.difference for pairs in by_seed(dora, lora).values() if pairs.p_value < LEVEL]
    return sum(one > 0 for one in clear), sum(one < 0 for one in clear)


def uneven(found: Iterable[Effect]) -> list[tuple[Effect, float]]:
    """Faults that hit one method more than the other, `turn` leaving out 0, each with its p after Holm over all."""
    found = list(found)
    adjusted = holm({str(i): one.turn_p for i, one in enumerate(found)})
    return [(one, adjusted[str(i)]) for i, one in enumerate(found) if not _open(one.turn)]


def effects_frame(found: Iterable[Effect]) -> pd.DataFrame:
    """All numbers, one row a fault and task, in percent and percentage points: what `faults.csv` holds."""
    rows = []
    for one in found:
        row = {"fault": one.fault, "against": one.against, "task": one.task}
        row |= {"seeds": len(one.seeds), "questions": one.items}
        for method in METHODS:
            for faulty, name in ((False, "without"), (True, "with")):
                row[f"{method}_{name}_pct"] = 100 * one.accuracy[method, faulty]
                row[f"{method}_unread_{name}_pct"] = 100 * one.unread[method, faulty]
            row |= _columns(f"{method}_change", one.change[method])
        row |= _columns("lead_without", one.lead[False]) | _columns("lead_with", one.lead[True])
        row |= _columns("turn", one.turn) | {"turn_p": one.turn_p}
        for faulty, name in ((False, "without"), (True, "with")):
            row[f"seeds_for_dora_{name}"], row[f"seeds_for_lora_{name}"] = one.wins[faulty]
        rows.append(row | {"verdict": one.verdict})
    return pd.DataFrame(rows)


def _columns(name: str, one: Interval) -> dict[str, float]:
    values = {"pp": one.estimate, "low_pp": one.low, "high_pp": one.high}
    return {f"{name}_{key}": 100 * value for key, value in values.items()}


def shown_effects(found: Iterable[Effect]) -> pd.DataFrame:
    """The table as it is read: percent without → with the fault, differences in points with 95 % limits."""
    rows = []
    for one in found:
        row = {"fault": one.fault, "against": one.against, "task": TASK_NAMES[one.task]}
        row["seeds × questions"] = f"{len(one.seeds)} × {one.items}"
        for method in METHODS:
            change = in_points(one.change[method])
            row[METHOD_NAMES[method]] = f"{_both(one.accuracy, method)}, {change}"
            row[f"{METHOD_NAMES[method]} unread"] = _both(one.unread, method)
        row["DoRA − LoRA without"], row["with"] = in_points(one.lead[False]), in_points(one.lead[True])
        row["turn"] = in_points(one.turn)
        row["seeds for DoRA : LoRA"] = " → ".join("{} : {}".format(*one.wins[faulty]) for faulty in _BOTH)
        rows.append(row | {"by the intervals": one.verdict})
    return pd.DataFrame(rows)


def _both(shares: Mapping[tuple[str, bool], float], method: str) -> str:
    return f"{100 * shares[method, False]:.1f} → {100 * shares[method, True]:.1f}"


def fault_notes(found: list[Effect], answers: Answers, profile: Profile | None = None) -> list[str]:
    """What the table comes to: leads that come and go, methods hit unevenly, single seeds, failures, gaps."""
    profile = profile or load_profile(PROFILE)
    undecided = [one for one in found if _open(one.lead[False])]
    turned = [f"{one.name} ({_said(one.lead[True])}{one.only})" for one in undecided if not _open(one.lead[True])]
    lost = [one.name for one in found if not _open(one.lead[False]) and _open(one.lead[True])]
    hit = [f"{one.name} ({in_points(one.turn)}{one.only}, p after Holm {p:.2g})" for one, p in uneven(found)]
    notes = [
        f"No difference without the fault, one with it, by the intervals: {_listed(turned)}; of {len(undecided)} rows "
        "without one. Only a `turn` that leaves out 0 shows that the fault did it.",
        f"A difference without the fault, none with it: {_listed(lost)}.",
        f"Faults that hit one method more than the other (`turn` leaves out 0): {_listed(hit)}.",
    ]
    pairs = sum(len(one.seeds) for one in found)
    for faulty, name in (
        (False, "Without the fault, where a pair may stand in several rows"),
        (True, "With the fault"),
    ):
        dora, lora = (sum(one.wins[faulty][i] for one in found) for i in (0, 1))
        notes.append(
            f"{name}, {dora} of {pairs} single pairs of runs would have been called a win for DoRA, {lora} a "
            "win for LoRA (exact McNemar, 5 %)."
        )
    few = sorted({one.fault for one in found if len(one.seeds) == 1})
    if few:
        notes.append(f"One seed only: {_listed(few)}; these rows speak of two trained models, not of two methods.")
    for (variant, task, method), failed in answers.failed.items():
        seeds, reason = ", ".join(map(str, sorted(failed))), next(iter(failed.values()))
        notes.append(f"Failed: {variant} on {TASK_NAMES[task]}, {METHOD_NAMES[method]}, seeds {seeds}: {reason}")
    there = {(one.fault, one.task) for one in found}
    missing = [f"{v} on {TASK_NAMES[t]}" for v in profile.variants for t in profile.tasks if (v, t) not in there]
    if missing:
        notes.append(f"Without a seed that all four kinds of run have: {_listed(missing)}.")
    return notes


def _said(lead: Interval) -> str:
    return {"ahead": "DoRA ahead", "behind": "LoRA ahead"}.get(wording(lead), wording(lead))


def _open(one: Interval) -> bool:
    return wording(one).startswith("no")


def _listed(names: list[str]) -> str:
    return "; ".join(names) or "none"


def write_faults(
    found: list[Effect], answers: Answers, folder: str | Path, profile: Profile | None = None
) -> list[Path]:
    """Write `faults.md`, to be read, and `faults.csv`, every number, into the folder; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    grid = markdown_table(shown_effects(found), words=4)
    notes = "".join(f"- {note}\n" for note in fault_notes(found, answers, profile))
    write_text(folder / "faults.md", f"{HEADING}\n\n{grid}\n\n{notes}")
    effects_frame(found).to_csv(folder / "faults.csv", index=False, float_format="%.4g", lineterminator="\n")
    return [folder / "faults.md", folder / "faults.csv"]
