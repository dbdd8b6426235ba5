"""Grades a folder of submissions: repair, nbgrader, feedback pages, one CSV. Resumes; one bad file stops nothing."""

import csv
import hashlib
import html
import io
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dora_lab.assignments import course as nbgrader_course
from dora_lab.assignments import isolation, sandbox
from dora_lab.assignments.build import marking, points_of
from dora_lab.assignments.catalogue import ASSIGNMENTS, Assignment, find_assignment
from dora_lab.assignments.repair import read_submission, repair
from dora_lab.files import write_text

SUBMISSION_SECONDS = 600.0  # for one whole submission
LARGEST_FOLDER = 200 * 2**20  # of files handed in with a notebook
TROUBLES = {
    "TimeLimit": "over the time limit",
    "WorkerDied": "out of memory, or ended itself",
    "CellTimeoutError": "over time",
}


@dataclass(frozen=True)
class Handed:
    """One submission as found: the student's id and the notebook."""

    student: str
    notebook: Path


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


def collect(folder: Path) -> list[Handed]:
    """Every submission in `folder`: `<student>/….ipynb`, or `<student>.ipynb`, sorted by student.

    A student with several notebooks hands in the one named like an assignment, else the first. Raises ValueError if
    there is none.
    """
    found: dict[str, Path] = {}
    names = {assignment.name for assignment in ASSIGNMENTS}
    for entry in sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name)):
        if entry.is_dir() and not entry.name.startswith("."):
            inside = sorted(p for p in entry.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.is_file())
            inside.sort(key=lambda path: path.stem not in names)
            if inside:
                found.setdefault(_student_id(entry.name), inside[0])
        elif entry.suffix == ".ipynb" and entry.is_file():
            found.setdefault(_student_id(entry.stem), entry)
    if not found:
        raise ValueError(
            f"no notebooks in {folder}: a submission is <student id>/<assignment>.ipynb or <student id>.ipynb"
        )
    return [Handed(student, path) for student, path in sorted(found.items())]


def which_assignment(handed: list[Handed]) -> Assignment:
    """The assignment that most submissions are of, by file name or grade ids. Raises ValueError if none says."""
    votes: Counter[str] = Counter()
    for one in handed:
        known = [a.number for a in ASSIGNMENTS if a.name == one.notebook.stem]
        votes.update(
            known or set(re.findall(r'"grade_id":\s*"a(\d\d)-', one.notebook.read_text("utf-8", errors="replace")))
        )
    if not votes:
        raise ValueError("no notebook says which assignment it is of: give --assignment")
    return find_assignment(votes.most_common(1)[0][0])


def grade(
    folder: Path,
    out: Path,
    assignment: Assignment | None = None,
    jobs: int = 2,
    seconds: float = isolation.CELL_SECONDS,
    memory_bytes: int = isolation.MEMORY_BYTES,
    report: Callable[[str], None] = print,
) -> Path:
    """Grade every submission in `folder` into `out`; returns the CSV. What is graded already, unchanged, is kept.

    jobs: submissions at a time. seconds, memory_bytes: for a cell or a call of submitted code. `out` gets `grades.csv`,
    `feedback/<student>.html` and `course/`, an nbgrader course. Raises ValueError without submissions, RuntimeError
    without nbgrader.
    """
    handed = collect(folder)
    assignment = assignment or which_assignment(handed)
    course = out.resolve() / "course"
    release = nbgrader_course.create(course, assignment, seconds, memory_bytes, folder)
    (out / "feedback").mkdir(exist_ok=True)
    (course / "graded").mkdir(exist_ok=True)
    report(f"assignment {assignment.number}, {assignment.title}: {len(handed)} submissions; {sandbox.describe()}")
    results = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_grade_one, one, assignment, release, course, out) for one in handed]
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                result = done.result()
                results.append(result)
                most = sum(points_of(release).values())
                what = result.failure or f"{result.score:g} of {most:g}" + (", more by hand" if result.by_hand else "")
                flags = f", {len(result.flags)} flags" if result.flags else ""
                report(f"[{number}/{len(handed)}] {result.student}: {what}{flags} ({result.seconds:.0f} s)")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return write_grades(sorted(results, key=lambda r: r.student), assignment, release, out / "grades.csv")


def write_grades(results: list[Graded], assignment: Assignment, release: NotebookNode, path: Path) -> Path:
    """One row a student: student_id, assignment, score, max_score, points by exercise, to_grade_by_hand, flags."""
    worth = points_of(release)
    exercises = [name.removesuffix("-test") for name in worth]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["student_id", "assignment", "score", "max_score", *exercises, "to_grade_by_hand", "flags"])
    for r in results:
        own = [f"{r.points.get(name, 0.0):g}" for name in worth]
        flags = "; ".join([r.failure] * bool(r.failure) + r.flags)
        by_hand = "yes" if r.by_hand else "no"
        table.writerow([r.student, assignment.name, f"{r.score:g}", sum(worth.values()), *own, by_hand, flags])
    write_text(path, text.getvalue())
    return path


def _student_id(name: str) -> str:
    """A name that is safe in paths, in nbgrader's patterns and in a spreadsheet."""
    return re.sub(r"[^\w.@-]", "_", name).lstrip("@.-") or "unnamed"


def _grade_one(one: Handed, assignment: Assignment, release: NotebookNode, course: Path, out: Path) -> Graded:
    """Grade one, whatever it does; a failure is a result."""
    started = time.monotonic()
    note = course / "graded" / f"{one.student}.json"
    flags: list[str] = []
    digest, failure = "", ""
    try:
        digest = _digest(one, assignment)
        if note.is_file() and (earlier := json.loads(note.read_text()))["digest"] == digest and not earlier["failure"]:
            flags = earlier["flags"]
        else:
            notebook, flags = repair(read_submission(one.notebook), release, one.student)
            _hand_over(one, notebook, assignment, course)
            failure = nbgrader_course.autograde(course, assignment, one.student, SUBMISSION_SECONDS)
            flags += [] if failure else _troubles(course, assignment, one.student)
    except Exception as error:  # a submission may be anything
        failure = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    failure = failure and f"not graded: {failure}"
    write_text(note, json.dumps({"digest": digest, "flags": flags, "failure": failure}) + "\n")
    scores, by_hand = {}, False
    if not failure:
        scores, by_hand, was_by_hand = nbgrader_course.points(course, assignment, one.student)
        if was_by_hand:
            nbgrader_course.feedback(course, assignment, one.student, SUBMISSION_SECONDS)
    result = Graded(one.student, scores, by_hand, flags, failure, time.monotonic() - started)
    _write_feedback(result, assignment, course, out / "feedback" / f"{one.student}.html")
    return result


def _digest(one: Handed, assignment: Assignment) -> str:
    """A hash of all that was handed in."""
    total = hashlib.sha256(one.notebook.read_bytes())
    for path in _files_with(one, assignment):
        total.update(f"{path.relative_to(one.notebook.parent)}\n".encode() + path.read_bytes())
    return total.hexdigest()


def _files_with(one: Handed, assignment: Assignment) -> list[Path]:
    """Records of runs handed in with the notebook; no links. Raises ValueError if they are too large."""
    if not assignment.uses_lab:
        return []
    base = one.notebook.parent / "runs"
    files = [
        p
        for p in sorted(base.rglob("*.json*"))
        if p.is_file() and not p.is_symlink() and p.resolve().is_relative_to(base.resolve())
    ]
    size = sum(path.stat().st_size for path in files)
    if size > LARGEST_FOLDER:
        raise ValueError(
            f"the files in {base.name} have {size / 2**20:.0f} MiB: at most {LARGEST_FOLDER // 2**20} are read"
        )
    return files


def _hand_over(one: Handed, notebook: NotebookNode, assignment: Assignment, course: Path) -> None:
    """Put the repaired notebook, and the runs that came with it, where nbgrader looks for submissions."""
    target = course / "submitted" / one.student / assignment.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in _files_with(one, assignment):
        copy = target / path.relative_to(one.notebook.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    nbformat.write(notebook, target / f"{assignment.name}.ipynb")


def _troubles(course: Path, assignment: Assignment, student: str) -> list[str]:
    """What stopped a cell from outside: time, memory. Read from the autograded notebook."""
    path = course / "autograded" / student / assignment.name / f"{assignment.name}.ipynb"
    flags = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error" and output.ename in TROUBLES:
                name = marking(cell).get("grade_id", "a cell of the student's own")
                flags.append(f"{name}: {TROUBLES[output.ename]}")
    return flags


def _write_feedback(result: Graded, assignment: Assignment, course: Path, page: Path) -> None:
    """nbgrader's page with the flags on top; a plain page where there is none."""
    source = nbgrader_course.feedback_page(course, assignment, result.student)
    told = [result.failure] * bool(result.failure) + result.flags
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in told)
    box = f"<div style='margin:1em 2em'><b>What was noticed</b><ul>{notes}</ul></div>" if told else ""
    if result.failure or not source.is_file():
        title = html.escape(f"{result.student}: assignment {assignment.number}")
        write_text(page, f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1>{box}\n")
        return
    text = source.read_text(encoding="utf-8")
    write_text(page, re.sub(r"<body[^>]*>", lambda m: m[0] + box, text, count=1))
