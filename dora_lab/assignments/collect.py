"""What was handed in: whose it is, the notebook that counts, the runs that came with it. Links are never followed."""

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dora_lab.assignments.catalogue import ASSIGNMENTS, Assignment, find_assignment
from dora_lab.assignments.repair import LARGEST_FILE

LARGEST_FOLDER = 200 * 2**20  # of files handed in with a notebook
LITTER = ("__MACOSX", ".ipynb_checkpoints")  # folders that archives and Jupyter leave


@dataclass(frozen=True)
class Handed:
    """One submission as found.

    student: the id as the folder or file has it, in Unicode's composed form; it seeds the student's own numbers and
    stands in the table. problem: why it cannot be graded; "" if it can.
    """

    student: str
    notebook: Path
    flags: tuple[str, ...] = ()
    problem: str = ""

    @property
    def name(self) -> str:
        """The id as it may stand in paths and in nbgrader's patterns."""
        return re.sub(r"[^\w.@-]", "_", self.student).lstrip("@.-")[:80] or "unnamed"


def collect(folder: Path) -> list[Handed]:
    """Every submission in `folder`: `<student>/….ipynb`, or `<student>.ipynb`, sorted by student.

    A student with several notebooks hands in the one named like an assignment, else the first. Raises ValueError if
    there is none, or if two would be graded under one name, saying which.
    """
    found: list[Handed] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name in LITTER:
            continue
        if entry.is_dir():
            found += _of_folder(entry, folder)
        elif entry.suffix == ".ipynb" and (entry.is_file() or entry.is_symlink()):
            found.append(_handed(entry.stem, [entry], folder))
    if not found:
        raise ValueError(
            f"no notebooks in {folder}: a submission is <student id>/<assignment>.ipynb or <student id>.ipynb"
        )
    names = Counter(one.name for one in found)
    if double := sorted(one.student for one in found if names[one.name] > 1):
        raise ValueError(
            f"{', '.join(map(repr, double))} in {folder} would be graded under one name: rename or remove all but one"
        )
    return sorted(found, key=lambda one: one.student)


def which_assignment(handed: list[Handed]) -> Assignment:
    """The assignment that most submissions are of, by file name or grade ids. Raises ValueError if none says."""
    votes: Counter[str] = Counter()
    for one in (one for one in handed if not one.problem):
        known = [a.number for a in ASSIGNMENTS if a.name == one.notebook.stem]
        votes.update(
            known or set(re.findall(r'"grade_id":\s*"a(\d\d)-', one.notebook.read_text("utf-8", errors="replace")))
        )
    if not votes:
        raise ValueError("no notebook says which assignment it is of: give --assignment")
    return find_assignment(votes.most_common(1)[0][0])


def files_with(one: Handed, assignment: Assignment) -> list[Path]:
    """Records of runs handed in with the notebook; no links. Raises ValueError if they are too large."""
    if not assignment.uses_lab:
        return []
    base = one.notebook.parent
    files = [path for path in sorted((base / "runs").rglob("*.json*")) if path.is_file() and _in_place(path, base)]
    size = sum(path.stat().st_size for path in files)
    if size > LARGEST_FOLDER:
        raise ValueError(
            f"the files in {base.name}/runs have {size / 2**20:.0f} MiB: at most {LARGEST_FOLDER // 2**20} are read"
        )
    return files


def digest(one: Handed, assignment: Assignment) -> str:
    """A hash of all that was handed in."""
    total = hashlib.sha256(one.notebook.read_bytes())
    for path in files_with(one, assignment):
        total.update(f"{path.relative_to(one.notebook.parent)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def _of_folder(entry: Path, folder: Path) -> list[Handed]:
    """A student's submission, or nothing where there is no notebook."""
    names = {assignment.name for assignment in ASSIGNMENTS}
    inside = [
        path
        for path in entry.rglob("*.ipynb")
        if not path.name.startswith("._")
        and not set(path.relative_to(entry).parts) & set(LITTER)
        and (path.is_file() or path.is_symlink())
    ]
    inside.sort(key=lambda path: (path.stem not in names, path))
    return [_handed(entry.name, inside, folder)] if inside else []


def _handed(student: str, notebooks: list[Path], folder: Path) -> Handed:
    """The first notebook that is a file of the student's own; links are flagged, and a problem where all are."""
    student = unicodedata.normalize("NFC", student).strip()
    own = [path for path in notebooks if _in_place(path, folder)]
    flags = tuple(f"{path.name} is a link, not followed" for path in notebooks if path not in own)
    if not own:
        return Handed(student, notebooks[0], flags, "what was handed in is a link, which is not followed")
    size = own[0].stat().st_size
    problem = f"{own[0].name} has {size / 2**20:.0f} MiB: at most {LARGEST_FILE // 2**20} are read"
    return Handed(student, own[0], flags, problem if size > LARGEST_FILE else "")


def _in_place(path: Path, base: Path) -> bool:
    """Whether nothing on the way from `base` to `path` is a link."""
    return path.resolve() == base.resolve() / path.relative_to(base)
