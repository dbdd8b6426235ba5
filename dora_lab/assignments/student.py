"""What an assignment's set-up defines: numbers of one's own, comparisons. `build` copies it into the student's file."""

import hashlib
import unicodedata

import torch


def personal_seed(student_id, name):
    """A seed that the student id and `name` give, however the id's letters are composed."""
    text = unicodedata.normalize("NFC", f"{student_id}".strip())
    return int.from_bytes(hashlib.sha256(f"{text}/{name}".encode()).digest()[:6], "big")


def personal(student_id, name, *shape):
    """Whole numbers from -9 to 9 without 0, float64, drawn from the student id and `name`: always the same ones."""
    generator = torch.Generator().manual_seed(personal_seed(student_id, name))
    drawn = torch.randint(1, 19, shape, generator=generator).double()  # 1 … 18
    return torch.where(drawn > 9, 9 - drawn, drawn)


def personal_number(student_id, name, low, high):
    """A whole number from `low` to `high`, both included, drawn from the student id and `name`."""
    return low + personal_seed(student_id, name) % (high - low + 1)


def close(a, b):
    """Whether `a` is a tensor of b's shape that agrees with it up to float64's rounding."""
    if not isinstance(a, torch.Tensor) or a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    return bool(((a - b).abs() <= 1e-9 * (1 + b.abs().max())).all())


def same_number(value, expected):
    """Whether `value` is a plain number that agrees with `expected` to about four significant digits."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value - expected) <= 5e-4 * abs(expected)
