"""The mini-world as shipped: made again to the letter, balanced, closed between its splits, without shortcuts."""

import json
import random
import re

import pytest

from dora_lab.data import MINI_WORLD, load_examples
from dora_lab.evaluation import likelihood
from dora_lab.miniworld import controls, documents, questions
from dora_lab.miniworld.world import PROPERTIES, SPLITS, build_world
from dora_lab.models import load_base

WORLD = build_world()
QUIZ_LIKE = [
    kind for kind in documents.KINDS if kind not in ("fact", "wish", "story", "seen", "plain")
]  # what asks for a label


def _records(task, split):
    return json.loads((MINI_WORLD / task / f"{split}.json").read_text())


@pytest.mark.parametrize("task", questions.TASKS)
def test_the_shipped_files_are_what_the_generator_writes(task):
    for split in SPLITS:
        assert _records(task, split) == questions.questions(WORLD, task, split)


@pytest.mark.parametrize("task", questions.TASKS)
def test_labels_are_balanced_and_no_question_repeats(task):
    for split in SPLITS:
        records = _records(task, split)
        counts = [sum(r["answer"] == answer for r in records) for answer in questions.ANSWERS[task]]
        assert max(counts) - min(counts) <= 1
        assert len({r["instruction"] for r in records}) == len(records)


def test_properties_are_balanced_in_every_split():
    for split in SPLITS:
        for property_, (first, _) in PROPERTIES.items():
            having = sum(WORLD.facts[thing][property_] == first[0] for thing in WORLD.things[split])
            assert having * 2 == len(WORLD.things[split])


@pytest.mark.parametrize("task", questions.TASKS)
def test_nothing_of_the_test_split_is_in_the_train_file(task):
    held_out = {*WORLD.things["test"], *WORLD.activities["test"], *WORLD.things["validation"]}
    train = {word for r in _records(task, "train") for word in re.findall(r"\w+", r["instruction"])}
    assert train and not train & held_out


@pytest.mark.parametrize("kind", QUIZ_LIKE)
def test_nothing_held_out_is_in_a_quiz_like_document(kind):
    held_out = {*WORLD.things["test"], *WORLD.things["validation"]}
    held_out |= {*WORLD.activities["test"], *WORLD.activities["validation"]}
    rng = random.Random(11)
    words = {w for _ in range(2000) for w, _ in documents.document(WORLD, {kind: 1.0}, rng)}
    assert words and not words & held_out


def test_the_wording_of_the_prompts_is_not_in_the_pretraining_text():
    scaffold = set()
    for task in questions.TASKS:
        removed = controls.without_question(_records(task, "train")[0])["instruction"].lower()
        words = re.findall(r"[a-z]+[0-9]*|[^\sa-z0-9]", removed.split("\n\n")[0])
        scaffold |= set(zip(words, words[1:], words[2:], strict=False))
    rng = random.Random(12)
    mixture = dict.fromkeys(documents.KINDS, 1.0)
    for _ in range(10_000):
        words = [w for w, _ in documents.document(WORLD, mixture, rng)]
        assert not scaffold & set(zip(words, words[1:], words[2:], strict=False))


@pytest.mark.parametrize("task", questions.TASKS)
def test_majority_and_bag_of_words_stay_within_five_points_of_chance(task):
    train, test = _records(task, "train"), _records(task, "test")
    chance = 1 / len(questions.ANSWERS[task])
    assert abs(controls.majority_accuracy(train, test) - chance) <= 0.05
    assert abs(controls.bag_of_words_accuracy(train, test) - chance) <= 0.05


@pytest.mark.parametrize("task", questions.TASKS)
def test_the_base_is_at_chance_in_the_task_format(task):
    model, tokenizer = load_base("mini-world")
    predictions = likelihood(model, tokenizer, load_examples("mini-world", task, "test"), "alpaca-short", 100)
    accuracy = sum(p.prediction == p.gold for p in predictions) / len(predictions)
    assert abs(accuracy - 1 / len(questions.ANSWERS[task])) <= 0.05


def test_the_base_fits_its_limits():
    model, _ = load_base("mini-world")
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(f.stat().st_size for f in (MINI_WORLD.parent / "base").iterdir()) <= 8 * 2**20
