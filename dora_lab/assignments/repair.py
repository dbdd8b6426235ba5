"""Puts a submission back into the shape of what was handed out, cell by cell, by id.

Tests and set-up come from the release, whatever the student's file has there; only what stands in solution cells, and
cells of the student's own, is taken from the submission. Everything that had to be mended is told in flags.
"""

import ast
import re
import threading
import unicodedata
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dora_lab.assignments.build import HIDDEN, marking

LARGEST_FILE = 30 * 2**20
PARSING = threading.Lock()  # submissions are repaired side by side
# Of a repaired cell, read by `execute`: {"run": "both" | "test" | "submission", "names": […], "literal": True}.
ROLE = "course"


def read_submission(path: Path) -> NotebookNode:
    """The notebook as handed in. Raises ValueError saying why it cannot be read as one."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{path.name} has {path.stat().st_size / 2**20:.0f} MiB: at most {LARGEST_FILE // 2**20} are read"
        )
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        for cell in notebook.cells:
            if not (
                isinstance(cell.source, str) and isinstance(cell.metadata, dict) and isinstance(cell.cell_type, str)
            ):
                raise ValueError("a cell without source, metadata or type")
    except Exception as error:  # nbformat raises whatever a broken file leads it to
        words = " ".join(f"{type(error).__name__}: {error!s:.120}".split())
        raise ValueError(f"{path.name} is not a notebook ({words})") from None
    return notebook


def repair(submitted: NotebookNode, release: NotebookNode, student_id: str) -> tuple[NotebookNode, list[str]]:
    """(the notebook to grade, flags). release: what `build.stubbed` gives; its student_id is overwritten."""
    flags: list[str] = []
    places, found = _matched(submitted, release, flags)
    own = [[] for _ in range(len(release.cells) + 1)]  # the student's own cells, by the release cell they follow
    last = -1
    for position, cell in enumerate(submitted.cells):
        if position in places:
            last = max(last, places[position])
        elif cell.source.strip():
            own[last + 1].append(_own_cell(cell))
    result = nbformat.from_dict(release)
    cells = list(own[0])
    for index, cell in enumerate(result.cells):
        name = marking(cell).get("grade_id")
        theirs = found.get(index)
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = _with_student(cell.source, theirs, student_id, flags)
            cell.metadata[ROLE] = {"run": "both"}
        elif name is None:
            pass  # text of the assignment
        elif marking(cell)["solution"]:
            _take_answer(cell, theirs, flags)
        else:
            if theirs is None:
                flags.append(f"{name}: deleted, put back")
            elif _plain(theirs.source) != _plain(HIDDEN.sub("", cell.source)):
                flags.append(f"{name}: edited, put back")
            cell.metadata[ROLE] = {"run": "test" if marking(cell)["grade"] else "both"}
        cells += [cell, *own[index + 1]]
    result.cells = cells
    for position, cell in enumerate(cells):
        cell.id = f"cell-{position}"
    return result, flags


def _matched(submitted: NotebookNode, release: NotebookNode, flags: list[str]) -> tuple[dict[int, int], dict]:
    """(position in the submission -> index in the release; index in the release -> the submitted cell that counts)."""
    by_name = {marking(c)["grade_id"]: i for i, c in enumerate(release.cells) if marking(c)}
    by_id = {c.id: i for i, c in enumerate(release.cells)}
    claims: dict[int, list[int]] = {}
    for position, cell in enumerate(submitted.cells):
        mark = cell.metadata.get("nbgrader")
        grade_id = mark.get("grade_id") if isinstance(mark, dict) else None
        index = by_name.get(grade_id) if isinstance(grade_id, str) else None
        if index is None:
            index = by_id.get(cell.get("id"))
            if index is not None and marking(release.cells[index]):
                flags.append(f"{marking(release.cells[index])['grade_id']}: metadata changed, found by its cell id")
        if index is not None:
            claims.setdefault(index, []).append(position)
    taken = {position for positions in claims.values() for position in positions}
    for index, cell in enumerate(release.cells):  # answers whose cell lost every id: known by what they define
        names = names_of(cell) if marking(cell).get("solution") else []
        if names and index not in claims:
            for position, theirs in enumerate(submitted.cells):
                if position not in taken and theirs.cell_type == "code" and set(names) <= _defined(theirs.source):
                    claims[index] = [position]
                    taken.add(position)
                    flags.append(f"{marking(cell)['grade_id']}: metadata lost, found by what it defines")
                    break
    _match_by_text(submitted, release, claims, taken, flags)
    places, found = {}, {}
    for index, positions in claims.items():
        cell = release.cells[index]
        if len(positions) > 1 and marking(cell):
            answered = [p for p in positions if _plain(submitted.cells[p].source) != _plain(cell.source)]
            flags.append(f"{marking(cell)['grade_id']}: its id occurs {len(positions)} times, the last answer counts")
            positions = (answered or positions)[-1:]
        elif len(positions) > 1:
            positions = positions[:1]
        places[positions[0]], found[index] = index, submitted.cells[positions[0]]
    return places, found


def _match_by_text(
    submitted: NotebookNode, release: NotebookNode, claims: dict[int, list[int]], taken: set[int], flags: list[str]
) -> None:
    """Add to `claims` the cells that no id led to, as in files without cell ids: the one that sets student_id, and
    those whose text is the release's.
    """
    for index, cell in enumerate(release.cells):
        if index in claims:
            continue
        parameters, text = "parameters" in cell.metadata.get("tags", []), _plain(HIDDEN.sub("", cell.source))
        for position, theirs in enumerate(submitted.cells):
            sets_id = theirs.cell_type == "code" and re.search(r"^student_id\s*=", theirs.source, re.M)
            same = theirs.cell_type == cell.cell_type and _plain(theirs.source) == text
            if position not in taken and (sets_id if parameters else same):
                claims[index] = [position]
                taken.add(position)
                if marking(cell):
                    flags.append(f"{marking(cell)['grade_id']}: metadata lost, found by its text")
                break


def names_of(cell: NotebookNode) -> list[str]:
    """What a solution cell is to define: the functions and names of its stub."""
    return sorted(_defined(cell.source)) if cell.cell_type == "code" else []


def _defined(source: str) -> set[str]:
    try:
        tree = _parsed(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {name for node in tree.body for name in _assigned(node) or ()}


def _parsed(source: str, mode: str = "exec") -> ast.Module | ast.Expression:
    """`ast.parse`, one thread at a time: Python 3.11 counts the depth of a tree for all threads together, and raises
    SystemError when another one parses between (cpython#106905).
    """
    with PARSING:
        return ast.parse(source, mode=mode)


def _assigned(node: ast.stmt) -> list[str] | None:
    """The names that a statement gives values to (`a = 1`, `a, b = 1, 2`, `a: float = 1`); None if it does other."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])]
    return [name.id for name in names] if names and all(isinstance(name, ast.Name) for name in names) else None


def _take_answer(cell: NotebookNode, theirs: NotebookNode | None, flags: list[str]) -> None:
    """Put the student's text into a release's solution cell; what is typed in must be literal."""
    name = marking(cell)["grade_id"]
    if cell.cell_type == "code":
        cell.metadata[ROLE] = {"run": "submission", "names": names_of(cell)}
    if theirs is None:
        flags.append(f"{name}: deleted, counted as not answered")
        return
    if theirs.cell_type != cell.cell_type:
        flags.append(f"{name}: its cell type was changed, put back")
    literal = "literal" in cell.metadata.get("tags", [])
    typed = literals(theirs.source) if literal else None
    missing = [wanted for wanted in names_of(cell) if wanted not in (typed or {})]  # another cell may have computed it
    if literal and (typed is None or missing):
        what = "computed instead of typed in" if typed is None else f"{' and '.join(missing)} not typed in here"
        flags.append(f"{name}: {what}, not counted")
        cell.source = 'raise ValueError("type the numbers in: this cell may hold nothing but them")\n' + re.sub(
            r"^", "# ", theirs.source, flags=re.M
        )
        return
    if literal:
        cell.metadata[ROLE]["literal"] = True
    cell.source = theirs.source if cell.cell_type == "code" else _inert(theirs.source)


def literals(source: str) -> dict[str, object] | None:
    """The values that a cell of nothing but assigned literals (or the stub's `...`) gives; None for any other cell."""
    values: dict[str, object] = {}
    try:
        for node in _parsed(source).body:
            if _assigned(node) is None or node.value is None:
                return None
            value = ast.literal_eval(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    values[target.id] = value
                else:
                    values |= zip((part.id for part in target.elts), value, strict=True)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return values


def _with_student(source: str, theirs: NotebookNode | None, student_id: str, flags: list[str]) -> str:
    said = _said_id(theirs.source if theirs else "")
    if not said:
        flags.append(f"student_id is not given: graded as {student_id}")
    elif said != student_id:
        flags.append(f"student_id is {said[:40]!r}: graded as {student_id}, whose file it is")
    return re.sub(r"^student_id = .*$", lambda _: f"student_id = {student_id!r}", source, count=1, flags=re.M)


def _said_id(source: str) -> str:
    """The student id that a parameters cell gives, as `collect` has ids; "" if it gives none."""
    for line in re.findall(r"^student_id\s*=\s*(.+)$", source, re.M):
        try:
            value = ast.literal_eval(_parsed(line.strip(), "eval"))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, str | int):
            return unicodedata.normalize("NFC", f"{value}").strip()
    return ""


def _own_cell(cell: NotebookNode) -> NotebookNode:
    if cell.cell_type == "code":
        return nbformat.v4.new_code_cell(cell.source, metadata={ROLE: {"run": "submission", "names": []}})
    return nbformat.v4.new_markdown_cell(_inert(cell.source))


def _inert(text: str) -> str:
    """Markdown whose HTML and scripted links are shown, not obeyed, in feedback and Formgrader; nbconvert lets both by.

    A space does it, which text, code and mathematics survive: no tag begins with `< `, no entity (it may spell a link's
    scheme) with `& `, and no scheme ends in ` :`.
    """
    text = re.sub(r"<(?=[A-Za-z/!?])", "< ", text)
    text = re.sub(r"&(?=[#A-Za-z])", "& ", text)
    return re.sub(r"\b(javascript|vbscript|data)(?=\\?:)", r"\1 ", text, flags=re.I)


def _plain(source: str) -> str:
    return "\n".join(line.rstrip() for line in source.strip().splitlines())
