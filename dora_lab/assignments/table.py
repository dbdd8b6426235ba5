"""What became of the submissions, and the table of it that a learning-management system imports."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from dora_lab.assignments.build import points_of
from dora_lab.assignments.catalogue import Assignment
from dora_lab.files import write_text


@dataclass(frozen=True)
class Graded:
    """What became of one: points by grade id, flags, and why it was not graded ("" if it was)."""

    student: str
    points: dict[str, float]
    by_hand: bool
    flags: list[str]
    failure: str
    seconds: float

    @property
    def score(self) -> float:
        return sum(self.points.values())


def write_grades(results: list[Graded], assignment: Assignment, release: NotebookNode, path: Path) -> Path:
    """One row a student: student_id, assignment, score, max_score, points by exercise, to_grade_by_hand, flags.

    What was not graded has no score and no points: an empty cell, not a zero.
    """
    worth = points_of(release)
    exercises = [name.removesuffix("-test") for name in worth]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["student_id", "assignment", "score", "max_score", *exercises, "to_grade_by_hand", "flags"])
    for r in results:
        own = ["" if r.failure else f"{r.points.get(name, 0.0):g}" for name in worth]
        score, by_hand = ("", "") if r.failure else (f"{r.score:g}", "yes" if r.by_hand else "no")
        flags = "; ".join([r.failure] * bool(r.failure) + r.flags)
        row = [_cell(r.student), assignment.name, score, sum(worth.values()), *own, by_hand, _cell(flags)]
        table.writerow(row)
    write_text(path, text.getvalue())
    return path


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
