"""The eight commonsense tasks of LLM-Adapters: candidates, chance level, prompt, and a checked example.

A record is `{"instruction", "input", "output", "answer"}`; the instruction ends in a line "Answer format: a/b/…" that
names the candidates (arXiv 2304.01933, repository AGI-Edgerunners/LLM-Adapters).
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

ANSWER_PREFIX = "the correct answer is "
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
TEMPLATES = {
    "alpaca": PREAMBLE + "### Instruction:\n{instruction}\n\n### Response:\n",
    "alpaca-short": "### Instruction:\n{instruction}\n\n### Response:\n",
    # Ends in a token that alpaca-short never has there, for evaluation after training with that.
    "alpaca-short-other-end": "### Instruction:\n{instruction}\n\n### Response.\n",
    # The report's: every line after the first begins with 16 spaces, the one of the answer too.
    "alpaca-indented": PREAMBLE
    + "{pad}### Instruction:\n{pad}{{instruction}}\n{pad}\n{pad}### Response:\n{pad}".format(pad=16 * " "),
}
_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*$")


@dataclass(frozen=True)
class Task:
    """One task. `folder` is its name in LLM-Adapters; `candidates` are the answers that most of its items have.

    A mixture has no candidates of its own and is tested on its `parts`, other tasks.
    """

    name: str
    folder: str
    candidates: tuple[str, ...]
    title: str
    parts: tuple[str, ...] = ()

    @property
    def chance(self) -> float:
        """Accuracy of guessing among `candidates`; nan for a mixture, whose items differ."""
        return float(Fraction(1, len(self.candidates))) if self.candidates else math.nan


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{i + 1}" for i in range(count))


TASKS = {
    entry.name: entry
    for entry in (
        Task("boolq", "boolq", ("true", "false"), "BoolQ"),
        Task("piqa", "piqa", _numbered("solution", 2), "PIQA"),
        Task("social_i_qa", "social_i_qa", _numbered("answer", 3), "SIQA"),
        Task("hellaswag", "hellaswag", _numbered("ending", 4), "HellaSwag"),
        Task("winogrande", "winogrande", _numbered("option", 2), "WinoGrande"),
        Task("arc_easy", "ARC-Easy", _numbered("answer", 4), "ARC-e"),
        Task("arc_challenge", "ARC-Challenge", _numbered("answer", 4), "ARC-c"),
        Task("openbookqa", "openbookqa", _numbered("answer", 4), "OBQA"),
    )
}
MIXTURE = "commonsense_170k"  # the train files of all eight in one, as the paper trains
_ALL = TASKS | {MIXTURE: Task(MIXTURE, MIXTURE, (), "Commonsense 170k", tuple(TASKS))}


@dataclass(frozen=True)
class Example:
    """One checked question: `answer` is among `candidates`; `id` is `<task>-<split>-<index in its file>`."""

    id: str
    instruction: str
    answer: str
    candidates: tuple[str, ...]


def task(name: str) -> Task:
    """The task of that name, or the mixture of all. Raises ValueError naming the known ones."""
    if name not in _ALL:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(_ALL)}")
    return _ALL[name]


def parse_record(record: object, task: Task, where: str, example_id: str) -> Example:
    """Check one record of a data file. `where` names file and index in the ValueError that a bad one raises.

    The candidates are the item's own: an ARC item may have 3 or 5.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with instruction and answer, got {type(record).__name__}")
    for field in ("instruction", "answer"):
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise ValueError(f"{where}: field {field!r} is missing or empty; every record needs instruction and answer")
    instruction, answer = record["instruction"], record["answer"]
    named = _FORMAT.search(instruction)
    candidates = tuple(named.group(1).split("/")) if named else task.candidates
    if not candidates:
        raise ValueError(f"{where}: the instruction does not end in 'Answer format: …', which names the candidates")
    candidates = _as_listed(instruction, candidates)
    if answer not in candidates:
        raise ValueError(f"{where}: answer {answer!r} is not among the candidates {', '.join(candidates)}")
    return Example(example_id, instruction, answer, candidates)


def _as_listed(instruction: str, candidates: tuple[str, ...]) -> tuple[str, ...]:
    """Numbered candidates, as many as the item lists ("Answer1: … Answer2: …") should its format line say otherwise."""
    word = candidates[0].removesuffix("1")
    if candidates != _numbered(word, len(candidates)):
        return candidates
    count = 0
    while f"{word.capitalize()}{count + 1}:" in instruction:
        count += 1
    return _numbered(word, count) if count >= 2 else candidates


def answer_words(example: Example) -> tuple[str, ...]:
    """What the paper's evaluation looks for in a generated text (LLM-Adapters, `commonsense_evaluate.py`).

    The candidates; where they are answer1, answer2, … always five of them, however many the item has.
    """
    return _numbered("answer", 5) if example.candidates[0] == "answer1" else example.candidates


def parse_answer(text: str, example: Example) -> str | None:
    """The first answer word in a generated text, also inside a longer word; None if there is none."""
    words = sorted(answer_words(example), key=len, reverse=True)  # of two that begin alike the longer one
    found = re.search("|".join(map(re.escape, words)), text)
    return found and found.group()


def prompt(example: Example, template: str) -> str:
    """The text in front of the response, in LLM-Adapters' template (`alpaca`) or without its preamble."""
    return TEMPLATES[template].format(instruction=example.instruction)
