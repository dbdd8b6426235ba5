"""The three tasks of the mini-world, in LLM-Adapters' JSON form and wording."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from dora_lab.miniworld.world import COMPARATIVE, OPPOSITE, PEOPLE, PRONOUN, PROPERTIES, SPLITS, SYNONYM, World

N_QUESTIONS = {"train": 4000, "validation": 400, "test": 1000}
Record = dict[str, str]


def boolq(world: World, split: str, rng: random.Random) -> tuple[str, str]:
    """Is a thing so? Half of the questions are true. Returns (instruction, answer)."""
    thing = rng.choice(world.things[split])
    property_ = rng.choice(tuple(PROPERTIES))
    value = world.facts[thing][property_]
    holds = rng.random() < 0.5
    said = value if holds else OPPOSITE[value]
    word = SYNONYM[said] if rng.random() < SYNONYM_SHARE else said
    question = rng.choice(
        (f"is the {thing} {word}", f"would you call the {thing} {word}", f"can we say the {thing} is {word}")
    )
    instruction = (
        f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false"
    )
    return instruction, "true" if holds else "false"


def winogrande(world: World, split: str, rng: random.Random) -> tuple[str, str]:
    """Which of two things fills the blank? They differ in the property that decides."""
    property_ = rng.choice(tuple(PROPERTIES))
    right, wrong = pair_that_differs(world, world.things[split], property_, rng)
    value = world.facts[right][property_]
    word = SYNONYM[value] if rng.random() < SYNONYM_SHARE else value
    person = rng.choice(PEOPLE)
    he = PRONOUN[person]
    x, y = rng.sample((right, wrong), 2)
    sentence = rng.choice(
        (
            f"{person} saw the {x} and the {y}. {he} took the _ because {he} wanted a {word} thing.",
            f"{person} had the {x} and the {y}. the _ was too {word}.",
            f"{person} had the {x} and the {y}. the {COMPARATIVE[value]} one was the _.",
        )
    )
    options = rng.sample((right, wrong), 2)
    instruction = (
        f"Please choose the correct answer to fill in the blank to complete the given sentence: {sentence}\n\n"
        f"Option1: {options[0]} Option2: {options[1]} Answer format: option1/option2"
    )
    return instruction, f"option{options.index(right) + 1}"


def hellaswag(world: World, split: str, rng: random.Random) -> tuple[str, str]:
    """What comes next in an activity? The wrong endings are steps of other activities of the same split."""
    activity = rng.choice(world.activities[split])
    steps = world.steps[activity]
    position = rng.randint(1, len(steps) - 1)  # of the step to find
    shown = steps[max(0, position - rng.randint(1, 2)) : position]
    others = [s for a in world.activities[split] for s in world.steps[a] if s not in steps]
    wrong: list[str] = []
    later = steps[position + 1 :]
    if later and rng.random() < LATER_STEP_SHARE:
        wrong.append(rng.choice(later))
    while len(wrong) < 3:
        step = rng.choice(others)
        if step not in wrong:
            wrong.append(step)
    endings = rng.sample([steps[position], *wrong], 4)
    person = rng.choice(PEOPLE)
    he = PRONOUN[person]
    told = f"{person} " + f". then {he} ".join(shown) + f". then {he}"
    listed = " ".join(f"Ending{i + 1}: {ending}" for i, ending in enumerate(endings))
    instruction = (
        f"Please choose the correct ending to complete the given sentence: {activity}: {told}\n\n"
        f"{listed}\n\nAnswer format: ending1/ending2/ending3/ending4"
    )
    return instruction, f"ending{endings.index(steps[position]) + 1}"


TASKS: dict[str, Callable] = {"boolq": boolq, "hellaswag": hellaswag, "winogrande": winogrande}
ANSWERS = {
    "boolq": ("true", "false"),
    "winogrande": ("option1", "option2"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
}
SYNONYM_SHARE = 0.0
LATER_STEP_SHARE = 0.0


def questions(world: World, task: str, split: str) -> list[Record]:
    """Distinct records of one task and split, every answer equally often (to within one), in a fixed random order."""
    rng = random.Random(f"{task}/{split}")
    wanted = N_QUESTIONS[split]
    kept: dict[str, str] = {}
    count = dict.fromkeys(ANSWERS[task], 0)
    misses = 0
    while len(kept) < wanted and misses < 20_000:
        instruction, answer = TASKS[task](world, split, rng)
        if instruction in kept or count[answer] > min(count.values()):
            misses += 1
            continue
        kept[instruction] = answer
        count[answer] += 1
        misses = 0
    while max(count.values()) > min(count.values()):  # ran out of new questions: drop what is over
        over = max(count, key=count.get)
        last = next(i for i in reversed(kept) if kept[i] == over)
        del kept[last]
        count[over] -= 1
    records = [
        {"instruction": i, "input": "", "output": f"the correct answer is {a}", "answer": a} for i, a in kept.items()
    ]
    rng.shuffle(records)
    return records


def write_task_files(world: World, folder: Path) -> None:
    """Write `<folder>/<task>/<split>.json` for the three tasks."""
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            text = json.dumps(questions(world, task, split), indent=0)
            (folder / task / f"{split}.json").write_text(text + "\n")


def pair_that_differs(world: World, things: tuple[str, ...], property_: str, rng: random.Random) -> tuple[str, str]:
    """Two things of `things` with different values of `property_`."""
    x, y = rng.sample(things, 2)
    while world.facts[x][property_] == world.facts[y][property_]:
        y = rng.choice(things)
    return x, y
