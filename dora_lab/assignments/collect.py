"""What was handed in: whose it is, the notebook that counts, the runs that came with it. Links are never followed."""

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from dora_lab.assignments.catalogue import ASSIGNMENTS, Assignment, find_assignment
from dora_lab.assignments.repair import LARGEST_FILE

LARGEST_FOLDER = 200 * 2**20  # of files handed in with a notebook
LITTER = ("__MACOSX", ".ipynb_checkpoints")  # folders that archives and Jupyter leave
OUTPUT = ("course", "feedback", "grades.csv")  # of grading, where it is written among the submissions


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


def collect(folder: Path, assignment: Assignment | None = None, out: Path | None = None) -> list[Handed]:
    """Every submission in `folder`: `<student>/….ipynb`, or `<student>.ipynb`, sorted by student.

    Of several notebooks in a folder counts one of `assignment` by its grade ids, then one named like an assignment,
    then the first; the others are told in flags. What has no notebook in it is found too, with a problem. out: where
    grades are written, no submission. Raises ValueError if there is no notebook at all, or if two would be graded under
    one name, saying which.
    """
    found: list[Handed] = []
    loose: dict[str, list[Path]] = {}  # files that are no notebooks, by whose they are
    ours = [] if out is None else [out / name for name in OUTPUT] if out.resolve() == folder.resolve() else [out]
    for entry in sorted(folder.iterdir()):
        if _litter(entry, folder) or any(_same(entry, path) for path in ours):
            continue
        if entry.is_dir():
            found += _of_folder(entry, folder, assignment, ours)
        elif entry.suffix == ".ipynb":
            found.append(_handed(entry.stem, [entry], folder, assignment))
        else:
            loose.setdefault(entry.name.split(".ipynb")[0] if ".ipynb" in entry.name else entry.stem, []).append(entry)
    if not any(one.notebook.suffix == ".ipynb" for one in found):
        raise ValueError(
            f"no notebooks in {folder}: a submission is <student id>/<assignment>.ipynb or <student id>.ipynb"
        )
    for student, files in loose.items():
        one = Handed(unicodedata.normalize("NFC", student).strip(), files[0], (), f"no notebook: {_said(files)}")
        beside = [i for i, other in enumerate(found) if other.name == one.name]
        for i in beside:
            found[i] = replace(
                found[i], flags=(*found[i].flags, f"{_said(files).removeprefix('found ')} beside it, not graded")
            )
        found += [] if beside else [one]
    names = Counter(one.name for one in found)
    if double := sorted(one.student for one in found if names[one.name] > 1):
        raise ValueError(
            f"{', '.join(map(repr, double))} in {folder} would be graded under one name: rename or remove all but one"
        )
    return sorted(found, key=lambda one: one.student)


def which_assignment(handed: list[Handed]) -> Assignment:
    """The assignment that most submissions are of, by grade ids or file name. Raises ValueError if none says."""
    votes: Counter[str] = Counter()
    for one in (one for one in handed if not one.problem):
        votes.update(_numbers(one.notebook))
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


def _numbers(path: Path) -> set[str]:
    """The assignments that a notebook says it is of: by its grade ids, else by its name."""
    ids = set()
    if path.stat().st_size <= LARGEST_FILE:
        ids = set(re.findall(r'"grade_id":\s*"a(\d\d)-', path.read_text("utf-8", errors="replace")))
    known = {a.number: a.name for a in ASSIGNMENTS}
    return ids & set(known) or {number for number, name in known.items() if name == path.stem}


def _of_folder(entry: Path, folder: Path, assignment: Assignment | None, ours: list[Path]) -> list[Handed]:
    """A student's submission; nothing for a folder that holds no more than where grades are written."""
    files = [path for path in sorted(entry.rglob("*")) if (path.is_file() or path.is_symlink())]
    students = [path for path in files if not any(path.absolute().is_relative_to(out.absolute()) for out in ours)]
    inside = [path for path in students if not _litter(path, entry)]
    if files and not students:
        return []
    notebooks = [path for path in inside if path.suffix == ".ipynb"]
    if notebooks:
        return [_handed(entry.name, notebooks, folder, assignment)]
    student = unicodedata.normalize("NFC", entry.name).strip()
    return [Handed(student, entry, (), f"no notebook in it: {_said(inside)}")]


def _handed(student: str, notebooks: list[Path], folder: Path, assignment: Assignment | None) -> Handed:
    """The notebook that counts, of those that are the student's own files; links are flagged, and a problem where all
    are.
    """
    student = unicodedata.normalize("NFC", student).strip()
    own = [path for path in notebooks if _in_place(path, folder)]
    flags = [f"{path.name} is a link, not followed" for path in notebooks if path not in own]
    if not own:
        return Handed(student, notebooks[0], tuple(flags), "what was handed in is a link, which is not followed")
    wanted = [assignment] if assignment else ASSIGNMENTS
    numbers, names = {a.number for a in wanted}, {a.name for a in wanted}
    own.sort(key=lambda path: (not _numbers(path) & numbers, path.stem not in names, path))
    flags += [f"{path.name} was handed in too, not graded" for path in own[1:]]
    if (others := _numbers(own[0])) and not others & numbers:
        flags.append(f"{own[0].name} is of assignment {' and '.join(sorted(others))}")
    size = own[0].stat().st_size
    problem = f"{own[0].name} has {size / 2**20:.0f} MiB: at most {LARGEST_FILE // 2**20} are read"
    return Handed(student, own[0], tuple(flags), problem if size > LARGEST_FILE else "")


def _said(files: list[Path]) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"found {', '.join(path.name for path in files[:3])}{more}" if files else "it is empty"


def _litter(path: Path, base: Path) -> bool:
    """Whether it is hidden, or what archives and Jupyter leave."""
    return path.name.startswith(".") or bool(set(path.relative_to(base).parts) & set(LITTER))


def _same(path: Path, other: Path) -> bool:
    return not path.is_symlink() and path.resolve() == other.resolve()


def _in_place(path: Path, base: Path) -> bool:
    """Whether nothing on the way from `base` to `path` is a link."""
    return path.resolve() == base.resolve() / path.relative_to(base)
