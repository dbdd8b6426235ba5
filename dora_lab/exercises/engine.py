"""How an answer is judged: what it does is observed and set beside what the right one and known mistakes would do.

An exercise never reads code. It runs the answer on small seeded inputs (`observe`) and compares the observation with
`expected()`, which comes from the lab's own functions or from an identity, and then with what each known misconception
gives. A wrong answer that behaves like a misconception is told which idea went wrong, not what the answer is.
"""

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

STATUSES = ("not tried", "wrong", "error", "right")
TOLERANCE = 1e-5


class Malformed(Exception):
    """An answer of a kind that cannot be observed, such as a number where a function is asked for."""


@dataclass(frozen=True)
class Misconception:
    """A known mistake: its name, an answer that makes it, and the idea that went wrong, without the right answer."""

    name: str
    wrong: Any
    message: str


@dataclass(frozen=True)
class Exercise:
    """One question as data.

    observe: answer -> what is compared: numbers, strings, tensors, or tuples and dicts of these. Raises Malformed for
    an answer of the wrong kind. expected: () -> the observation of a right answer. hints: from vague to near.
    """

    id: str
    question: str
    observe: Callable[[Any], Any]
    expected: Callable[[], Any]
    misconceptions: tuple[Misconception, ...]
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What `check` says. status: one of STATUSES; diagnosis: the name of a misconception, or None."""

    exercise: str
    status: str
    message: str
    diagnosis: str | None = None

    def __repr__(self) -> str:
        name = f" ({self.diagnosis})" if self.diagnosis else ""
        return f"Exercise {self.exercise}: {self.status}{name}. {self.message}"


def judge(exercise: Exercise, answer: Any) -> Verdict:
    """Run the answer and say whether it is not tried, wrong, in error, or right."""

    def verdict(status: str, message: str, diagnosis: str | None = None) -> Verdict:
        return Verdict(exercise.id, status, message, diagnosis)

    not_tried = verdict("not tried", f"{exercise.question} A first hint: hint({exercise.id!r}).")
    if is_blank(answer):
        return not_tried
    try:
        observed = exercise.observe(answer)
    except NotImplementedError:
        return not_tried
    except Malformed as problem:
        return verdict("wrong", f"{problem}")
    except Exception as problem:  # the student's code may raise anything
        return verdict("error", f"Your code raised {_located(problem)}. It was not judged further.")
    if is_blank(observed):
        return not_tried
    expected = exercise.expected()
    if same(observed, expected):
        return verdict("right", "Yes.")
    for misconception in exercise.misconceptions:
        if same(observed, exercise.observe(misconception.wrong)):
            return verdict("wrong", misconception.message, misconception.name)
    return verdict("wrong", f"{_difference(observed, expected)} Another hint: hint({exercise.id!r}).")


def is_blank(answer: Any) -> bool:
    """Whether nothing was answered: `...`, None, or a tuple or list of nothing but those."""
    if answer is ... or answer is None:
        return True
    return isinstance(answer, tuple | list) and len(answer) > 0 and all(is_blank(part) for part in answer)


def same(a: Any, b: Any) -> bool:
    """Whether two observations agree: whole numbers and words exactly, other numbers to a relative TOLERANCE."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, str | set | frozenset) or isinstance(b, str | set | frozenset):
        return a == b
    x, y = _as_tensor(a), _as_tensor(b)
    if x is None or y is None or x.shape != y.shape:
        return False
    if not y.numel() or torch.equal(y, y.round()):  # counts: one more or less is another answer
        return bool(torch.allclose(x, y, rtol=0.0, atol=1e-6))
    scale = float(y.abs().max())
    return bool(torch.allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE * scale if math.isfinite(scale) else 0.0))


def number(answer: Any) -> float:
    """An observer for exercises whose answer is a number."""
    value = _as_tensor(answer)
    if value is None or value.numel() != 1:
        raise Malformed(f"Give one number; this is a {type(answer).__name__}.")
    return float(value)


def function(answer: Any, arguments: str) -> Callable:
    """`answer` itself if it can be called. arguments: how it will be called, for the message."""
    if not callable(answer):
        raise Malformed(f"Give a function of ({arguments}); this is a {type(answer).__name__}.")
    return answer


def seeded(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Small float64 inputs, the same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _as_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().double()
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return None


def _located(problem: Exception) -> str:
    """The exception's name and text, and the line of the student's code where it came up."""
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    own = [f for f in traceback.extract_tb(problem.__traceback__) if "dora_lab" not in f.filename]
    frame = own[-1] if own and "site-packages" not in own[-1].filename else frame
    line = f", at `{frame.line}`" if frame.line else ""
    return f"{type(problem).__name__}: {problem}{line}"


def _difference(observed: Any, expected: Any) -> str:
    """What can be said of an unknown mistake without giving the answer away."""
    if isinstance(expected, tuple) and isinstance(observed, tuple | list) and len(observed) == len(expected):
        for place, (x, y) in enumerate(zip(observed, expected, strict=True), start=1):
            if not same(x, y):
                return f"Part {place} of {len(expected)} is off: " + _difference(x, y)
    x, y = _as_tensor(observed), _as_tensor(expected)
    if x is None or y is None:
        return f"That is not it, and no known misconception either (a {type(observed).__name__} came back)."
    if x.shape != y.shape:
        return f"The shape {tuple(x.shape)} came back where {tuple(y.shape)} was expected."
    if not torch.isfinite(x).all():
        return "Something infinite or not a number came back."
    return "The value is not right, and it is not one of the misconceptions known for this exercise."
