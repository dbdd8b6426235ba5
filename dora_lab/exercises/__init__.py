"""The self-checks of the chapters: `check("03.2", answer)` and `hint("03.2")`.

Exercises are data, one file a chapter; `engine` says how an answer is judged. No right solution is written down here:
answers are compared with what the lab's own functions give.
"""

from typing import Any

from dora_lab.exercises import (
    chapter_01,
    chapter_02,
    chapter_03,
    chapter_04,
    chapter_05,
    chapter_06,
    chapter_09,
    chapter_13,
    chapter_14,
)
from dora_lab.exercises.engine import STATUSES, Exercise, Misconception, Verdict, judge

__all__ = ["EXERCISES", "STATUSES", "Exercise", "Hint", "Misconception", "Verdict", "check", "hint"]

_CHAPTERS = (chapter_01, chapter_02, chapter_03, chapter_04, chapter_05, chapter_06, chapter_09, chapter_13, chapter_14)
EXERCISES: dict[str, Exercise] = {exercise.id: exercise for chapter in _CHAPTERS for exercise in chapter.EXERCISES}
_hints_shown: dict[str, int] = {}


class Hint(str):
    """A hint that a notebook shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def check(exercise: str, answer: Any) -> Verdict:
    """Judge an answer. `status` is "not tried", "wrong", "error" or "right"; see `Verdict`.

    Raises ValueError for an unknown exercise.
    """
    return judge(_find(exercise), answer)


def hint(exercise: str) -> Hint:
    """The next hint; after the last one, the last again. Raises ValueError for an unknown exercise."""
    hints = _find(exercise).hints
    place = min(_hints_shown.get(exercise, 0), len(hints) - 1)
    _hints_shown[exercise] = place + 1
    return Hint(f"Hint {place + 1} of {len(hints)} for {exercise}: {hints[place]}")


def _find(exercise: str) -> Exercise:
    if exercise not in EXERCISES:
        raise ValueError(f"unknown exercise {exercise!r}: choose one of {', '.join(EXERCISES)}")
    return EXERCISES[exercise]
