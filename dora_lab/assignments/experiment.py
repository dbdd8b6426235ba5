"""Assignment 04 reads a student's runs: whether they are sound, whose they are, what they say. Nothing is trained."""

import dataclasses
import re
from pathlib import Path

from dora_lab.assignments.student import personal_number
from dora_lab.data import MINI_WORLD, data_sha256, load_examples
from dora_lab.models import base_sha256
from dora_lab.records import RunRecord, read_predictions, read_record
from dora_lab.statistics import correct_by_id

SEEDS = 3
RECORDED_SEEDS = [0, 1, 2]
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
    that do not differ or are of different tasks.
    """
    if not isinstance(arms, dict) or len(arms) != 2:
        raise ValueError("an experiment has two arms: give {name: [run ids], name: [run ids]}")
    settings = {}
    for name, run_ids in arms.items():
        if not isinstance(run_ids, list | tuple) or not all(isinstance(run_id, str) for run_id in run_ids):
            raise ValueError(f"arm {name!r} is to be a list of run ids, the names of the runs' folders")
        records = [_sound_record(folder, run_id) for run_id in run_ids]
        if sorted(record.spec.seed for record in records) != sorted(seeds):
            raise ValueError(f"arm {name!r} is to have one run for each of your seeds {seeds}")
        kinds = {repr(_but_seed(record)) for record in records}
        if len(kinds) > 1:
            raise ValueError(
                f"the runs of arm {name!r} differ in more than the seed: then the seed is not all that varies"
            )
        settings[name] = records[0].spec.task, kinds.pop()
    (task, first), (other_task, second) = settings.values()
    if task != other_task:
        raise ValueError(f"one arm is of {task}, the other of {other_task}: they answered different questions")
    if first == second:
        raise ValueError("the two arms are the same: something has to differ between them")
    return task


def _but_seed(record: RunRecord) -> dict:
    return {k: v for k, v in dataclasses.asdict(record.spec).items() if k not in ("seed", "profile")}


def _sound_record(folder: Path, run_id: str) -> RunRecord:
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
    gold = {example.id: example.answer for example in load_examples(str(MINI_WORLD), spec.task, "test")}
    if {row["id"]: row["gold"] for row in rows} != gold or len(rows) != len(gold):
        raise ValueError(f"the answers in {run_id} are not those to the {len(gold)} test questions of {spec.task}")
    for row in rows:
        if row["prediction"] != max(row["log_likelihoods"], key=row["log_likelihoods"].get):
            raise ValueError(
                f"in {run_id}, question {row['id']}: the answer is not the one that the model found likeliest"
            )
    correct = sum(correct_by_id(rows).values())
    if (correct, len(rows)) != (result.correct, result.n) or abs(result.accuracy - correct / len(rows)) > 1e-9:
        raise ValueError(
            f"the record in {run_id} does not say what its answers say: {correct} of {len(rows)} are right"
        )
    return record
