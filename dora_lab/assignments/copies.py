"""What several submissions have in common beyond chance: the same code, the same runs. It makes flags, no points."""

import ast
import itertools
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dora_lab.assignments.build import is_test, marking
from dora_lab.assignments.likelihoods import alike, likelihoods_of
from dora_lab.records import read_predictions

SHORTEST = 60  # nodes of a syntax tree: below, two people write the same without having seen each other
FEW = 3  # students; what more of them share, and more than one in eight, is the obvious way to write it


def copies(notebooks: dict[str, Path]) -> dict[str, list[str]]:
    """student -> flags, for those who share something. notebooks: each student's repaired one, its runs beside it."""
    flags: dict[str, list[str]] = {student: [] for student in notebooks}
    few = max(FEW, len(notebooks) // 8)
    found: dict[tuple[str, str], list[str]] = {}
    for student, path in notebooks.items():
        for exercise, form in _forms(nbformat.read(path, as_version=4)).items():
            found.setdefault((exercise, form), []).append(student)
    for (exercise, _), students in found.items():
        for student in students if 2 <= len(students) <= few else ():
            others = ", ".join(other for other in students if other != student)
            flags[student].append(f"{exercise}: the same code as {others}")
    for (one, mine), (other, theirs) in itertools.combinations(_runs(notebooks).items(), 2):
        if one[0] != other[0] and one[1] != other[1] and alike(mine, theirs):
            flags[one[0]].append(f"the answers in {one[1]} are those in {other[1]} of {other[0]}")
            flags[other[0]].append(f"the answers in {other[1]} are those in {one[1]} of {one[0]}")
    return {student: told for student, told in flags.items() if told}


def normal_form(source: str) -> str:
    """The code without what is changed first in a copy: layout, comments, docstrings, imports, names of variables.

    "" for code that is shorter than SHORTEST, or none.
    """
    try:
        tree = ast.parse(source)
        _rename(tree)
        return ast.dump(tree) if sum(1 for _ in ast.walk(tree)) >= SHORTEST else ""
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""


def _rename(tree: ast.Module) -> None:
    """Number the variables of functions and loops in order, and take imports, annotations and docstrings out."""
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    nodes = list(ast.walk(tree))
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.arg):
            names.setdefault(node.arg, f"v{len(names)}")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.setdefault(node.id, f"v{len(names)}")
    for node in nodes:
        if isinstance(node, ast.arg):
            node.arg, node.annotation = names[node.arg], None
        elif isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
            if len(node.body) > 1 and ast.get_docstring(node) is not None:
                del node.body[0]


def _forms(notebook: NotebookNode) -> dict[str, str]:
    """grade id -> normal form of every function that was asked for."""
    asked = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and marking(cell).get("solution") and not marking(cell)["grade"]
        if not is_test(cell) and "literal" not in cell.metadata.get("tags", [])
    ]
    forms = {marking(cell)["grade_id"]: normal_form(cell.source) for cell in asked}
    return {exercise: form for exercise, form in forms.items() if form}


def _runs(notebooks: dict[str, Path]) -> dict[tuple[str, str], object]:
    """(student, run id) -> likelihoods of every run handed in that can be read."""
    found = {}
    for student, path in notebooks.items():
        for predictions in sorted(path.parent.glob("runs/*/*/predictions.jsonl")):
            try:
                found[student, predictions.parent.name] = likelihoods_of(read_predictions(predictions.parent))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # its own checks say what is wrong
                continue
    return found
