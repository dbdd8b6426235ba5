"""Assignment 04 reads a student's runs: whether they are sound, whose they are, what they say. Nothing is trained."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np

from dora_lab.assignments.likelihoods import alike, likelihoods_of, recorded
from dora_lab.assignments.student import personal_number
from dora_lab.data import MINI_WORLD, data_sha256, load_examples
from dora_lab.models import base_sha256
from dora_lab.records import RunRecord, read_predictions, read_record
from dora_lab.specs import RunSpec
from dora_lab.statistics import correct_by_id

SEEDS = 3
RECORDED_SEEDS = [0, 1, 2]
MAY_DIFFER = ("method", "rank", "learning_rate", "steps")  # one of them, between the arms
LESSON = "lesson"  # the chapter's own student, whose runs are the recorded ones


def own_seeds(student_id: str) -> list[int]:
    """The three seeds that this student's runs have to have, so that runs cannot be passed on."""
    if student_id == LESSON:
        return RECORDED_SEEDS
    return [personal_number(student_id, f"seed {i}", 1000 * (i + 1), 1000 * (i + 1) + 999) for i in range(SEEDS)]


def examine(folder: Path, arms: dict[str, list[str]], seeds: list[int]) -> str:
    """The task of an experiment whose records hold together. folder: of the profile's runs; arms: name -> run ids.

    Raises ValueError saying what is wrong: not two arms with one run for each seed, a record that does not fit its
    predictions, its folder's name or the mini-world's questions, runs of an arm that differ in more than the seed, arms
    that do not differ, differ in more than one of MAY_DIFFER, or are of different tasks, answers that are those of a
    recorded run or of another run of the six.
    """
    if not isinstance(arms, dict) or len(arms) != 2:
        raise ValueError("an experiment has two arms: give {name: [run ids], name: [run ids]}")
    settings, answers = [], {}
    for name, run_ids in arms.items():
        if not isinstance(run_ids, list | tuple) or not all(isinstance(run_id, str) for run_id in run_ids):
            raise ValueError(f"arm {name!r} is to be a list of run ids, the names of the runs' folders")
        sound = [_sound_record(folder, run_id) for run_id in run_ids]
        specs = [record.spec for record, _ in sound]
        if sorted(spec.seed for spec in specs) != sorted(seeds):
            raise ValueError(f"arm {name!r} is to have one run for each of your seeds {seeds}")
        if len({repr(_but_seed(spec)) for spec in specs}) > 1:
            raise ValueError(
                f"the runs of arm {name!r} differ in more than the seed: then the seed is not all that varies"
            )
        settings.append(_but_seed(specs[0]))
        answers |= {spec.run_id: (spec.seed, likelihoods) for spec, (_, likelihoods) in zip(specs, sound, strict=True)}
    first, second = settings
    if first["task"] != second["task"]:
        raise ValueError(
            f"one arm is of {first['task']}, the other of {second['task']}: they answered different questions"
        )
    _differ_in_one(first, second)
    _not_copied(answers, recorded(first["task"]))
    return first["task"]


def _but_seed(spec: RunSpec) -> dict:
    return {k: v for k, v in dataclasses.asdict(spec).items() if k not in ("seed", "profile")}


def _differ_in_one(first: dict, second: dict) -> None:
    """Raise ValueError unless the settings differ in one of MAY_DIFFER: alpha goes with the rank, and a rank that one
    of the methods does not have goes with the method.
    """
    differing = {name for name in first if first[name] != second[name]}
    if "method" in differing and None in (first["rank"], second["rank"]):
        differing -= {"rank", "alpha"}
    if "rank" in differing:
        differing -= {"alpha"}
    if not differing:
        raise ValueError("the two arms are the same: something has to differ between them")
    if len(differing) > 1 or not differing <= set(MAY_DIFFER):
        raise ValueError(
            f"the arms differ in {' and '.join(sorted(differing))}: one of {', '.join(MAY_DIFFER)} may differ and "
            "nothing else; what the profile has for each method, -p learning_rate gives to both"
        )


def _not_copied(answers: dict[str, tuple[int, np.ndarray]], known: dict[str, tuple[int, np.ndarray]]) -> None:
    """Raise ValueError where answers of another seed's run were given another name. Both: run id -> (seed, …)."""
    for (one, (_, first)), (other, (_, second)) in itertools.combinations(answers.items(), 2):
        if alike(first, second):
            raise ValueError(f"the answers in {one} are those in {other}: six runs are asked for")
    for run_id, (seed, likelihoods) in answers.items():
        for other, (other_seed, theirs) in known.items():
            if seed != other_seed and alike(likelihoods, theirs):
                raise ValueError(f"the answers in {run_id} are those of the recorded run {other}, of another seed")


def _sound_record(folder: Path, run_id: str) -> tuple[RunRecord, np.ndarray]:
    """The record and its answers' likelihoods. Raises ValueError for one that does not hold together."""
    if not re.fullmatch(r"[a-z0-9-]+", run_id) or not (folder / run_id / "record.json").is_file():
        raise ValueError(
            f"there is no finished run {run_id!r} in {folder}: hand in the folder of runs with the notebook"
        )
    record = read_record(folder / run_id)
    spec, result = record.spec, record.result
    if spec.run_id != run_id:
        raise ValueError(f"the record in {run_id} is of another run ({spec.run_id})")
    if spec.split != "test" or spec.base_sha256 != base_sha256("mini-world"):
        raise ValueError(f"{run_id} is to be a run of the mini-world's base model, scored on its test questions")
    if spec.data_sha256 != data_sha256("mini-world", spec.task):
        raise ValueError(f"{run_id} was not trained and scored on the mini-world's {spec.task}")
    rows = read_predictions(folder / run_id)
    likelihoods = likelihoods_of(rows)
    examples = {example.id: example for example in load_examples(str(MINI_WORLD), spec.task, "test")}
    gold = {name: example.answer for name, example in examples.items()}
    if {row["id"]: row["gold"] for row in rows} != gold or len(rows) != len(gold):
        raise ValueError(f"the answers in {run_id} are not those to the {len(gold)} test questions of {spec.task}")
    for row in rows:
        if set(row["log_likelihoods"]) != set(examples[row["id"]].candidates):
            raise ValueError(f"in {run_id}, question {row['id']}: other answers were scored than the question has")
        if row["prediction"] != max(row["log_likelihoods"], key=row["log_likelihoods"].get):
            raise ValueError(
                f"in {run_id}, question {row['id']}: the answer is not the one that the model found likeliest"
            )
    correct = sum(correct_by_id(rows).values())
    if (correct, len(rows)) != (result.correct, result.n) or abs(result.accuracy - correct / len(rows)) > 1e-9:
        raise ValueError(
            f"the record in {run_id} does not say what its answers say: {correct} of {len(rows)} are right"
        )
    return record, likelihoods
