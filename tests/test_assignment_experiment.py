"""Assignment 04 reads records: experiments that hold together, and those that do not, are forged or copied."""

import dataclasses
import itertools
import json
import shutil

import pytest

from dora_lab.assignments.difference import paired
from dora_lab.assignments.experiment import examine, own_seeds
from dora_lab.assignments.likelihoods import alike, recorded
from dora_lab.pipeline import RECORDED
from dora_lab.records import read_record


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "mini"
    folder.mkdir()
    kinds = ("winogrande-lora-r[12]", "winogrande-dora-r[12]", "winogrande-full", "boolq-*-r2", "boolq-dora-magnitude")
    for pattern in (f"{kind}-s[0-2]-*" for kind in kinds):
        for path in (RECORDED / "mini").glob(pattern):
            shutil.copytree(path, folder / path.name)
    return folder


def arm(folder, kind):
    return sorted(path.name for path in folder.glob(f"{kind}-s*"))


def _record(folder, run_id, **values):
    path = folder / run_id / "record.json"
    record = json.loads(path.read_text())
    for key, value in values.items():
        record["spec" if key in record["spec"] else "result"][key] = value
    path.write_text(json.dumps(record))


def _first_rows(folder, run_id, count=None, **values):
    path = folder / run_id / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    wrong = next(row for row in rows if row["prediction"] != row["gold"])
    wrong.update({key: value(wrong) for key, value in values.items()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))


def _two(folder):
    return {"LoRA": arm(folder, "winogrande-lora-r2"), "DoRA": arm(folder, "winogrande-dora-r2")}


def _made_again(folder, run_ids, **values):
    """The runs as if they had been made with other settings: records and folders renamed alike, answers as they are."""
    made = []
    for run_id in run_ids:
        record = read_record(folder / run_id)
        own = {key: value(record.spec.seed) if callable(value) else value for key, value in values.items()}
        spec = dataclasses.replace(record.spec, **own)
        shutil.copytree(folder / run_id, folder / spec.run_id, dirs_exist_ok=True)
        _record(folder, spec.run_id, **own)
        made.append(spec.run_id)
    return made


SOUND = {
    "two methods": _two,
    "two ranks": lambda f: {"1": arm(f, "winogrande-lora-r1"), "2": arm(f, "winogrande-lora-r2")},
    "another task": lambda f: {"a": arm(f, "boolq-lora-r2"), "b": arm(f, "boolq-dora-r2")},
    "in another order": lambda f: dict(reversed([(k, v[::-1]) for k, v in _two(f).items()])),
    "a rank of DoRA": lambda f: {"1": arm(f, "winogrande-dora-r1"), "2": arm(f, "winogrande-dora-r2")},
    "a method without rank": lambda f: {
        "a": arm(f, "boolq-lora-r2"),
        "b": _made_again(f, arm(f, "boolq-dora-magnitude"), learning_rate=0.003),
    },
    "as tuples": lambda f: {name: tuple(ids) for name, ids in _two(f).items()},
}
UNSOUND = {
    "one arm": (lambda f: {"LoRA": arm(f, "winogrande-lora-r2")}, "two arms"),
    "a list": (lambda f: list(_two(f).values()), "two arms"),
    "arms that are no lists": (lambda f: dict.fromkeys(("a", "b"), "winogrande-lora-r2"), "list of run ids"),
    "two seeds": (lambda f: {k: v[:2] for k, v in _two(f).items()}, "one run for each of your seeds"),
    "one run three times": (lambda f: {k: v[:1] * 3 for k, v in _two(f).items()}, "one run for each of your seeds"),
    "a mixed arm": (
        lambda f: {"a": arm(f, "winogrande-lora-r2")[:2] + arm(f, "winogrande-lora-r1")[2:], "b": _two(f)["DoRA"]},
        "differ in more than the seed",
    ),
    "two tasks": (lambda f: {"a": arm(f, "boolq-lora-r2"), "b": _two(f)["DoRA"]}, "different questions"),
    "twice the same": (lambda f: dict.fromkeys(("a", "b"), _two(f)["DoRA"]), "the two arms are the same"),
    "method and rank": (
        lambda f: {"a": arm(f, "winogrande-lora-r1"), "b": arm(f, "winogrande-dora-r2")},
        "the arms differ in method and rank",
    ),
    "a method with its own learning rate": (
        lambda f: {"a": arm(f, "winogrande-lora-r2"), "b": arm(f, "winogrande-full")},
        "the arms differ in learning_rate and method",
    ),
    "a run that is not there": (lambda f: {"a": ["winogrande-lora-r2-s0-0000000000"] * 3, "b": []}, "no finished run"),
    "a path": (lambda f: {"a": ["../mini/" + i for i in arm(f, "boolq-lora-r2")], "b": []}, "no finished run"),
}
FORGED = {
    "a better accuracy": (lambda f, r: _record(f, r, accuracy=0.999, correct=999), "does not say what its answers say"),
    "a better accuracy alone": (lambda f, r: _record(f, r, accuracy=0.999), "does not say what its answers say"),
    "another seed": (lambda f, r: _record(f, r, seed=1), "is of another run"),
    "another rate": (lambda f, r: _record(f, r, learning_rate=0.1), "is of another run"),
    "a renamed folder": (lambda f, r: ((f / r).rename(f / "x"), (f / "x").rename(f / r[:-1])), "no finished run"),
    "answers made right": (
        lambda f, r: _first_rows(f, r, prediction=lambda row: row["gold"]),
        "not the one that the model found likeliest",
    ),
    "gold made the answer": (lambda f, r: _first_rows(f, r, gold=lambda row: row["prediction"]), "test questions"),
    "fewer questions": (lambda f, r: _first_rows(f, r, count=900), "test questions"),
    "likelihoods made to fit": (
        lambda f, r: _first_rows(
            f,
            r,
            prediction=lambda row: row["gold"],
            log_likelihoods=lambda row: {c: -float(c != row["gold"]) for c in row["log_likelihoods"]},
        ),
        "does not say what its answers say",
    ),
    "other candidates": (
        lambda f, r: _first_rows(f, r, log_likelihoods=lambda row: row["log_likelihoods"] | {"x": -99.0}),
        "other answers were scored",
    ),
    "likelihoods that are none": (
        lambda f, r: _first_rows(f, r, log_likelihoods=lambda row: dict.fromkeys(row["log_likelihoods"], float("nan"))),
        "no finite number",
    ),
    "no predictions": (lambda f, r: (f / r / "predictions.jsonl").write_text(""), "test questions"),
    "a damaged record": (lambda f, r: (f / r / "record.json").write_text("{"), "damaged"),
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_experiments_are_accepted(kind, runs):
    arms = SOUND[kind](runs)
    boolq = kind in ("another task", "a method without rank")
    assert examine(runs, arms, [0, 1, 2]) == ("boolq" if boolq else "winogrande")
    difference, discordant = paired(runs, arms)
    back = paired(runs, dict(reversed(arms.items())))
    assert back == (-difference, discordant) and abs(difference) * 30 <= discordant


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_experiment_that_is_none_is_refused(kind, runs):
    arms, words = UNSOUND[kind]
    with pytest.raises(ValueError, match=words):
        examine(runs, arms(runs), [0, 1, 2])


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_record_is_refused(kind, runs):
    forge, words = FORGED[kind]
    arms = _two(runs)
    forge(runs, arms["DoRA"][0])
    with pytest.raises(ValueError, match=words):
        examine(runs, arms, [0, 1, 2])


SEEDS = own_seeds("eve")
COPIED = {
    "the shipped runs": (lambda f: {name: _as_eves(f, ids) for name, ids in _two(f).items()}, "of the recorded run"),
    "one of the shipped runs three times": (
        lambda f: {name: [_as_eves(f, ids[:1], seed)[0] for seed in SEEDS] for name, ids in _two(f).items()},
        "six runs are asked for",
    ),
    "one arm as the other": (lambda f: _one_arm_twice(f), "six runs are asked for"),
}


def _as_eves(folder, run_ids, seed=None):
    return _made_again(folder, run_ids, seed=(lambda own: SEEDS[own]) if seed is None else seed)


def _moved(folder, run_ids):
    """The runs with likelihoods of no recorded run: as those of a seed that was never recorded."""
    for place, run_id in enumerate(run_ids):
        path = folder / run_id / "predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["log_likelihoods"] = {c: v - 0.1 * (place + 1) for c, v in row["log_likelihoods"].items()}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_ids


def _one_arm_twice(folder):
    own = _as_eves(folder, _moved(folder, arm(folder, "winogrande-lora-r2")))
    return {"LoRA": own, "DoRA": _made_again(folder, own, method="dora")}


@pytest.mark.parametrize("kind", COPIED)
def test_runs_with_a_new_label_are_refused(kind, runs):
    arms, words = COPIED[kind]
    with pytest.raises(ValueError, match=words):
        examine(runs, arms(runs), SEEDS)


def test_runs_of_ones_own_are_accepted(runs):
    arms = {name: _as_eves(runs, _moved(runs, ids)) for name, ids in _two(runs).items()}
    assert examine(runs, arms, SEEDS) == "winogrande"


def test_a_run_made_again_is_known_and_another_seed_is_not():
    task = recorded("winogrande")
    seeds = {run_id: likelihoods for run_id, (_, likelihoods) in task.items() if run_id.startswith("winogrande-full")}
    assert len(seeds) == 3
    for (one, first), (other, second) in itertools.product(seeds.items(), repeat=2):
        assert alike(first, second + 5e-5) == (one == other)


def test_runs_of_another_student_are_refused(runs):
    with pytest.raises(ValueError, match="one run for each of your seeds"):
        examine(runs, _two(runs), own_seeds("ada"))
