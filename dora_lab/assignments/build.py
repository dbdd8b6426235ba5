"""Cuts an assignment out of its chapter: the notebook that a student gets, and the one that nbgrader grades against.

A chapter's cell belongs to the assignment if it has nbgrader metadata or the tag `assignment`; the parameters cell is
cut down to what a student sets. Between `### BEGIN SOLUTION` and `### END SOLUTION` comes a stub, between
`### BEGIN HIDDEN TESTS` and `### END HIDDEN TESTS` nothing. The line that imports `assignments.student` becomes that
module's text, so that the student's file stands alone.
"""

import ast
import inspect
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dora_lab.assignments import student
from dora_lab.assignments.catalogue import Assignment
from dora_lab.files import write_text

SOLUTION = re.compile(r"^[ \t]*### BEGIN SOLUTION\n(?P<body>.*?)^[ \t]*### END SOLUTION\n?", re.M | re.S)
HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS\n?", re.M | re.S)
TOOLS = re.compile(r"^from dora_lab\.assignments\.student import .*\n", re.M)
ESSAY = "*Write your answer here, in place of this line.*"
FIGURE = "# Draw your figure here, in place of this line."


def marking(cell: NotebookNode) -> dict:
    """The cell's nbgrader metadata; empty for a cell without."""
    return cell.metadata.get("nbgrader", {})


def is_test(cell: NotebookNode) -> bool:
    """Whether the cell is an automatic test: graded, and not written by the student."""
    return bool(marking(cell).get("grade")) and not marking(cell).get("solution")


def points_of(notebook: NotebookNode) -> dict[str, int]:
    """Points by grade id, in order: of tests and of what is graded by hand."""
    return {marking(c)["grade_id"]: marking(c)["points"] for c in notebook.cells if marking(c).get("grade")}


def cut(assignment: Assignment) -> NotebookNode:
    """The assignment's cells as they stand in the chapter, solutions and hidden tests included, with a front page.

    Raises ValueError for a chapter whose cells are not marked as an assignment's must be, naming the cell.
    """
    chapter = nbformat.read(assignment.source, as_version=4)
    cells = [c for c in chapter.cells if marking(c) or "assignment" in c.metadata.get("tags", [])]
    _check(assignment, cells)
    for position, cell in enumerate(cells):
        cell.id = marking(cell).get("grade_id", f"text-{position}")  # a second way to know a cell by
        cell.source = TOOLS.sub(lambda _: _tools(), cell.source)
    body = nbformat.v4.new_notebook(cells=cells)
    body.metadata.kernelspec = chapter.metadata.kernelspec
    front = nbformat.v4.new_markdown_cell(_front_page(assignment, points_of(body)), id="front")
    lines = [f'{name} = "{value}"' for name, value in assignment.parameters]
    parameters = nbformat.v4.new_code_cell("\n".join(lines), id="parameters", metadata={"tags": ["parameters"]})
    body.cells = [front, parameters, *cells]
    return body


def stubbed(notebook: NotebookNode) -> NotebookNode:
    """The notebook with a stub for every solution; hidden tests stay, as nbgrader's gradebook needs them."""
    result = nbformat.from_dict(notebook)
    for cell in result.cells:
        cell.attachments = {}
        if marking(cell).get("solution"):
            cell.source = _stub(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if cell.cell_type == "code" or not cell.attachments:
            cell.pop("attachments", None)
    return result


def student_copy(notebook: NotebookNode) -> NotebookNode:
    """What is handed out: stubs, no hidden tests, tests and set-up locked."""
    result = stubbed(notebook)
    for cell in result.cells:
        cell.source = HIDDEN.sub("", cell.source)
        if marking(cell):
            cell.metadata.deletable = False
            if marking(cell)["locked"]:
                cell.metadata.editable = False
    return result


def build(assignment: Assignment, out: Path) -> Path:
    """Write the student's notebook to `out`; returns its path. Raises ValueError as `cut` does."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{assignment.name}.ipynb"
    write_text(path, nbformat.writes(student_copy(cut(assignment))) + "\n")
    return path


def _check(assignment: Assignment, cells: list[NotebookNode]) -> None:
    where = f"{assignment.source.name}, assignment {assignment.number}"
    ids = [marking(cell)["grade_id"] for cell in cells if marking(cell)]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{where}: every graded, solution and locked cell needs a grade_id of its own, got {ids}")
    for cell in cells:
        name = marking(cell).get("grade_id", "a text cell")
        marked = "BEGIN SOLUTION" in cell.source or "BEGIN HIDDEN TESTS" in cell.source
        if is_test(cell) and not HIDDEN.search(cell.source):
            raise ValueError(f"{where}: the test {name} has no hidden tests: a visible check alone can be written for")
        if cell.cell_type == "code" and marking(cell).get("solution") and not marking(cell)["grade"]:
            if not SOLUTION.search(cell.source):
                raise ValueError(f"{where}: the solution cell {name} has no ### BEGIN SOLUTION … ### END SOLUTION")
        elif marked and not is_test(cell):
            raise ValueError(f"{where}: {name} has a marked region and is neither a solution nor a test cell")


def _tools() -> str:
    code = inspect.getsource(student)
    return code[code.index("import hashlib") :]


def _stub(cell: NotebookNode) -> str:
    if cell.cell_type == "markdown":
        return ESSAY
    if marking(cell)["grade"]:
        return FIGURE
    return SOLUTION.sub(lambda region: _of_region(cell.source, region), cell.source).rstrip("\n")


def _of_region(source: str, region: re.Match) -> str:
    """`name = ...` for each name assigned at the top level; inside a function, an error that says what to write."""
    body = region["body"]
    if not body.startswith((" ", "\t")):
        names = [node.targets[0].id for node in ast.parse(body).body if isinstance(node, ast.Assign)]
        return "".join(f"{name} = ...\n" for name in names)
    indent = body[: len(body) - len(body.lstrip())].strip("\n")
    before = source[: region.start()]
    function = re.findall(r"^def (\w+)\(.*\n\s+\"\"\"(.*?)\"\"\"", before, re.M)[-1]
    return f'{indent}raise NotImplementedError("{function[0]}: {function[1]}")\n'


def _front_page(assignment: Assignment, points: dict[str, int]) -> str:
    rule = "Solutions are plain PyTorch: adapter libraries cannot be imported where they are graded. "
    rule, runs = ("", ", and the folder `runs` beside it") if assignment.uses_lab else (rule, "")
    return (
        f"# Assignment {assignment.number}: {assignment.title}\n\n"
        f"{sum(points.values())} points, about {assignment.hours} hours. Put your student id between the quotation "
        "marks of the next cell first: it seeds the numbers of your own. Write where a cell says so, and leave the "
        "other cells as they are; more cells of your own do no harm. "
        f"{rule}Before you hand in, restart the kernel and run all cells. Hand in this file under its own name{runs}.\n"
    )
