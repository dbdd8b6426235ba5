"""One nbgrader course folder for one assignment: its configuration, its gradebook, and nbgrader's own steps run in it.

`COURSE/` has `source`, `release`, `submitted`, `autograded`, `feedback` and `gradebook.db`, as nbgrader has them, so
that its formgrader opens it for what is graded by hand.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat

from dora_lab.assignments.build import cut, stubbed
from dora_lab.assignments.catalogue import Assignment
from dora_lab.profiles import PROJECT

CELL_SECONDS = 120  # for a whole cell; a test calls the student's functions many times
CONFIGURATION = """\
# Written by `dora-lab assignment grade`. Submitted code runs apart from the tests: dora_lab/assignments/isolation.py
from nbconvert.preprocessors import ClearMetadataPreprocessor, CSSHTMLHeaderPreprocessor
from nbgrader import preprocessors as p

from dora_lab.assignments.execute import HideTests, IsolatedExecute

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "dora-lab"
# Solutions are stubs already (assignments.build), so nothing is left for ClearSolutions.
c.GenerateAssignment.preprocessors = [
    p.LockCells, p.ClearOutput, p.CheckCellMetadata, p.ComputeChecksums, p.SaveCells, p.ClearHiddenTests,
    p.ComputeChecksums, p.CheckCellMetadata,
]
c.Autograde.autograde_preprocessors = [
    IsolatedExecute, ClearMetadataPreprocessor, p.LimitOutput, p.SaveAutoGrades, p.CheckCellMetadata,
]
c.ClearMetadataPreprocessor.preserve_cell_metadata_mask = ["nbgrader", "tags", "deletable", "editable"]
c.GenerateFeedback.preprocessors = [p.GetGrades, HideTests, CSSHTMLHeaderPreprocessor]
c.Execute.timeout = {cell_seconds}
c.IsolatedExecute.submission_seconds = {submission_seconds}
c.IsolatedExecute.memory_bytes = {memory_bytes}
c.IsolatedExecute.uses_lab = {uses_lab}
c.IsolatedExecute.hidden = {hidden!r}
"""


def require_nbgrader() -> None:
    """Raise RuntimeError, saying what to install, where nbgrader is missing."""
    if importlib.util.find_spec("nbgrader") is None:
        raise RuntimeError("nbgrader is missing: install the grading packages, pip install -e '.[grading]'")


def create(
    course: Path, assignment: Assignment, seconds: float, memory_bytes: int, submissions: Path
) -> nbformat.NotebookNode:
    """Make the folder and its gradebook from the chapter, or take it up again; returns the notebook graded against.

    seconds, memory_bytes: for a cell or call of submitted code, which may read neither the course nor what is handed in
    at `submissions`. Raises RuntimeError with nbgrader's last words.
    """
    require_nbgrader()
    notebook = stubbed(cut(assignment))
    source = course / "source" / assignment.name / f"{assignment.name}.ipynb"
    source.parent.mkdir(parents=True, exist_ok=True)
    values = {"cell_seconds": CELL_SECONDS, "submission_seconds": seconds, "memory_bytes": memory_bytes}
    hidden = [str(course.resolve()), str(submissions.resolve())]
    configuration = CONFIGURATION.format(**values, uses_lab=assignment.uses_lab, hidden=hidden)
    (course / "nbgrader_config.py").write_text(configuration)
    text = nbformat.writes(notebook) + "\n"
    made = course / "made"  # the gradebook appears before it is complete
    if (made.exists() or (course / "submitted").exists()) and source.is_file() and source.read_text() != text:
        raise RuntimeError(f"{course} was made from another version of the chapter: give another folder as --out")
    if made.exists() and (course / "gradebook.db").exists() and source.is_file():
        return notebook
    made.unlink(missing_ok=True)
    source.write_text(text)
    done = _run(course, ["-m", "nbgrader", "generate_assignment", assignment.name, "--create", "--force"], 300)
    if done:
        raise RuntimeError(f"nbgrader could not make the gradebook: {done}")
    made.touch()
    return notebook


def autograde(course: Path, assignment: Assignment, student: str, seconds: float) -> str:
    """Run nbgrader's autograder and its feedback for one student, in a process of its own; "" or what went wrong."""
    return _run(course, ["-m", __name__, assignment.name, student, "autograde", "generate_feedback"], seconds)


def feedback(course: Path, assignment: Assignment, student: str, seconds: float) -> str:
    """Run the feedback alone, after grading by hand."""
    return _run(course, ["-m", __name__, assignment.name, student, "generate_feedback"], seconds)


def work_folder(course: Path, student: str) -> Path:
    """Where the student's code has its folders while it runs (`execute`)."""
    return course / "work" / student


def points(course: Path, assignment: Assignment, student: str) -> tuple[dict[str, float], bool, bool]:
    """({grade id: points}, whether something is left to grade by hand, whether something was), from the gradebook.

    Raises KeyError for a student who is not in it.
    """
    from nbgrader.api import Gradebook, MissingEntry

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}", "dora-lab") as book:
        try:
            submission = book.find_submission_notebook(assignment.name, assignment.name, student)
        except MissingEntry:
            raise KeyError(student) from None
        scores = {grade.cell.name: float(grade.score) for grade in submission.grades}
        by_hand = any(grade.manual_score is not None for grade in submission.grades)
        return scores, submission.needs_manual_grade, by_hand


def feedback_page(course: Path, assignment: Assignment, student: str) -> Path:
    """Where nbgrader puts the student's page."""
    return course / "feedback" / student / assignment.name / f"{assignment.name}.html"


def _run(course: Path, arguments: list[str], seconds: float) -> str:
    """Run Python in the course folder; "" if it went well, else the last line that it wrote, or that time was up."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # nbgrader calls `alembic`
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=course,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:g} seconds"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = [line for line in said.splitlines() if line.strip()]
    return "" if process.returncode == 0 else (lines[-1] if lines else f"exit code {process.returncode}")


def _main(name: str, student: str, *steps: str) -> None:
    """In the course folder: nbgrader's steps for one student. Exits with nbgrader's error as the last line."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config.loader import PyFileConfigLoader

    logging.disable(logging.INFO)
    api = NbGraderAPI(config=PyFileConfigLoader("nbgrader_config.py", path=".").load_config())
    for step in steps:
        result = getattr(api, step)(name, student)
        if not result["success"]:
            words = [line for line in (result.get("log") or "").splitlines() if line.strip()]
            sys.stderr.write("\n".join(words))
            error = (result.get("error") or "").strip().splitlines()
            raise SystemExit(f"nbgrader: {error[-1] if error else words[-1] if words else 'no reason given'}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
