"""Sample submissions, to try grading with: one solved, one half solved, one hostile, one damaged, one not a notebook.

They are made from the chapter, which holds the solutions, so they go to the instructor's folder and not to students.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dora_lab.assignments.build import cut, is_test, marking, student_copy
from dora_lab.assignments.catalogue import Assignment
from dora_lab.files import write_text

HOSTILE = """\
import builtins, os, socket, subprocess, sys

for attempt in (
    lambda: [os.remove(f"../{name}") for name in os.listdir("..")],
    lambda: open("../../../gradebook.db", "w").write("all points"),
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: subprocess.run(["touch", "/tmp/was-here"]),
    lambda: sys.modules["__main__"].__dict__.update(close=lambda a, b: True, same_number=lambda a, b: True),
    lambda: get_ipython().events.register("pre_run_cell", lambda info: os._exit(0)),
    lambda: setattr(builtins, "isinstance", lambda a, b: True),
):
    try:
        attempt()
    except BaseException as refused:
        print("refused:", type(refused).__name__, refused)
"""


def answers(notebook: NotebookNode, student: str, **parameters: str) -> dict[str, str]:
    """Grade id -> source of every answer in `cut`'s notebook, with the numbers that are this student's own.

    The notebook is run with the student's id; a hidden test of typed-in numbers leaves them in `reference`.
    """
    given, namespace, typed = {}, {"student_id": student, **parameters}, None
    for cell in notebook.cells:
        name = marking(cell).get("grade_id")
        if name is None:
            continue
        if marking(cell)["solution"]:
            given[name] = cell.source
            typed = cell if "literal" in cell.metadata.get("tags", []) else None
        if cell.cell_type == "code" and not marking(cell)["grade"] or typed is not None and is_test(cell):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(AssertionError):
                exec(cell.source, namespace)
        if typed is not None and is_test(cell) and "reference" in namespace:
            given[marking(typed)["grade_id"]] = "".join(
                f"{key} = {value:.7g}\n" for key, value in namespace.pop("reference").items()
            )
    return given


def filled(notebook: NotebookNode, student: str, given: dict[str, str]) -> NotebookNode:
    """A student's file with these answers in it; what is not given stays a stub."""
    handed = student_copy(notebook)
    for cell in handed.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace('student_id = ""', f'student_id = "{student}"')
        cell.source = given.get(marking(cell).get("grade_id"), cell.source)
    return handed


def write_samples(assignment: Assignment, out: Path, report: Callable[[str], None] = print) -> dict[str, str]:
    """Write the sample submissions to `out`, one folder each; returns student -> what to expect.

    Raises ValueError for the assignment whose runs have to be made.
    """
    if assignment.uses_lab:
        raise ValueError(f"assignment {assignment.number} has no samples: its submissions are runs that someone made")
    notebook = cut(assignment)
    first = next(marking(cell)["grade_id"] for cell in notebook.cells if marking(cell).get("solution"))
    expected = {
        "sample-right": "all points",
        "sample-half": "all points but those of the first exercise",
        "sample-hostile": "no points, and no harm",
        "sample-damaged": "all points: tests deleted and edited, put back",
        "sample-broken": "not graded: not a notebook",
    }
    for student, words in expected.items():
        path = out / student / f"{assignment.name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        given = answers(notebook, student)
        if student == "sample-half":
            del given[first]
        if student == "sample-hostile":
            given = {first: HOSTILE}
        handed = filled(notebook, student, given)
        if student == "sample-damaged":
            tests = [cell for cell in handed.cells if is_test(cell)]
            tests[0].source = "assert True"
            handed.cells.remove(tests[1])
        text = "{}" if student == "sample-broken" else nbformat.writes(handed)
        write_text(path, text + "\n")
        report(f"{path}: {words}")
    return expected
