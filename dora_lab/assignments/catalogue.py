"""The assignments there are. Points and exercises stand in the chapters' cells, hours are an estimate for a student."""

from dataclasses import dataclass
from pathlib import Path

from dora_lab.profiles import PROJECT


@dataclass(frozen=True)
class Assignment:
    """One assignment: the chapter that it is cut from, and what a course plans with.

    parameters: of the chapter's parameters cell, those that a student gets, with the values they start from.
    uses_lab: whether a submission may import dora_lab (only where nothing that is asked for is in it).
    """

    number: str
    name: str
    title: str
    chapter: str
    hours: str
    examines: str
    parameters: tuple[tuple[str, str], ...] = (("student_id", ""),)
    uses_lab: bool = False

    @property
    def source(self) -> Path:
        return PROJECT / "notebooks" / f"{self.chapter}.ipynb"

    @property
    def guide(self) -> Path:
        """The instructor's page."""
        return PROJECT / "data" / "assignments" / f"{self.name}.md"


ASSIGNMENTS = (
    Assignment(
        "01",
        "01_lora_from_scratch",
        "LoRA from scratch",
        "01_low_rank_updates",
        "2 to 3",
        "how LoRA starts, its forward and its gradients, the best update of a rank, what is trained",
    ),
    Assignment(
        "02",
        "02_magnitude_and_direction",
        "Magnitude and direction",
        "02_magnitude_and_direction",
        "3 to 4",
        "the decomposition over the right axis, ΔM and ΔD, the gradients of magnitude and direction",
    ),
    Assignment(
        "03",
        "03_dora_from_scratch",
        "DoRA from scratch, with a merge",
        "03_dora_from_scratch",
        "4 to 5",
        "how DoRA starts, its forward with the norm held constant, the merged layer",
    ),
    Assignment(
        "04",
        "04_an_experiment",
        "An experiment of one's own",
        "08_results",
        "5 to 6",
        "a question, runs that answer it, a paired difference, a figure, a paragraph that says no more than they do",
        parameters=(("student_id", ""), ("runs_dir", "runs")),
        uses_lab=True,
    ),
)


def find_assignment(number: str) -> Assignment:
    """The assignment of this number ("03", "3") or name. Raises ValueError naming those there are."""
    for assignment in ASSIGNMENTS:
        if number in (assignment.number, assignment.number.lstrip("0"), assignment.name):
            return assignment
    known = ", ".join(f"{a.number} ({a.title})" for a in ASSIGNMENTS)
    raise ValueError(f"unknown assignment {number!r}: choose one of {known}")
