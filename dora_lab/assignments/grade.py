"""Grades a folder of submissions: repair, nbgrader, feedback pages, one table. Resumes; one bad file stops nothing."""

import html
import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dora_lab.assignments import course as nbgrader_course
from dora_lab.assignments import isolation, sandbox
from dora_lab.assignments.build import marking, points_of
from dora_lab.assignments.catalogue import Assignment
from dora_lab.assignments.collect import Handed, collect, digest, files_with, which_assignment
from dora_lab.assignments.copies import copies
from dora_lab.assignments.repair import read_submission, repair
from dora_lab.assignments.table import Graded, write_grades
from dora_lab.files import write_text

SUBMISSION_SECONDS = 600.0  # for one whole submission
STOPPED = "not graded: grading was stopped before its turn, the same command goes on"
TROUBLES = {
    "TimeLimit": "over the time limit",
    "WorkerDied": "out of memory, or ended itself",
    "CellTimeoutError": "over time",
}
NO_MEMORY = re.compile(r"^MemoryError|can't allocate memory|not enough memory")  # as Python and PyTorch say it


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
    assignment = assignment or which_assignment(collect(folder, out=out))
    handed = collect(folder, assignment, out)
    course = out.resolve() / "course"
    release = nbgrader_course.create(course, assignment, seconds, memory_bytes, folder)
    limits = {"seconds": seconds, "memory_bytes": memory_bytes}
    (out / "feedback").mkdir(exist_ok=True)
    (course / "graded").mkdir(exist_ok=True)
    report(f"assignment {assignment.number}, {assignment.title}: {len(handed)} submissions; {sandbox.describe()}")
    results = {one.student: Graded(one.student, {}, False, [], STOPPED, 0.0) for one in handed}
    most = sum(points_of(release).values())
    try:
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(_grade_one, one, assignment, release, course, out, limits) for one in handed]
            try:
                for number, done in enumerate(as_completed(waiting), 1):
                    result = done.result()
                    results[result.student] = result
                    report(f"[{number}/{len(handed)}] {_said(result, most)}")
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:  # interrupted, too: what is graded stands in the table
        found = _flagged(list(results.values()), handed, assignment, course)
        table = write_grades(found, assignment, release, out / "grades.csv")
    return table


def _flagged(results: list[Graded], handed: list[Handed], assignment: Assignment, course: Path) -> list[Graded]:
    """With flags for what students share: in the table alone, because a student's page names no other student."""
    graded = {result.student for result in results if not result.failure}
    notebooks = {
        one.student: _submitted(course, one, assignment) / f"{assignment.name}.ipynb"
        for one in handed
        if one.student in graded
    }
    try:
        flags = copies(notebooks)
    except Exception as error:  # the grades stand without
        flags = dict.fromkeys(graded, [f"not compared with the others: {type(error).__name__}: {error}"])
    return [replace(result, flags=[*result.flags, *flags.get(result.student, [])]) for result in results]


def _said(result: Graded, most: float) -> str:
    what = result.failure or f"{result.score:g} of {most:g}" + (", more by hand" if result.by_hand else "")
    flags = f", {len(result.flags)} flags" if result.flags else ""
    return f"{result.student}: {what}{flags} ({result.seconds:.0f} s)"


def _grade_one(
    one: Handed, assignment: Assignment, release: NotebookNode, course: Path, out: Path, limits: dict[str, float]
) -> Graded:
    """Grade one, whatever it does; a failure is a result."""
    started = time.monotonic()
    flags, points, by_hand, failure = list(one.flags), {}, False, ""
    try:
        points, by_hand = _points(one, assignment, release, course, flags, limits)
    except Exception as error:  # a submission may be anything, and a gradebook may be locked
        plain = isinstance(error, ValueError | RuntimeError)
        failure = f"not graded: {error}" if plain else f"not graded: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(nbgrader_course.work_folder(course, one.name), ignore_errors=True)
    result = Graded(one.student, points, by_hand, flags, failure, time.monotonic() - started)
    try:
        _write_feedback(result, assignment, course, one.name, out / "feedback" / f"{one.name}.html")
    except Exception as error:
        result = replace(result, flags=[*flags, f"no feedback page: {type(error).__name__}: {error}"])
    return result


def _points(
    one: Handed,
    assignment: Assignment,
    release: NotebookNode,
    course: Path,
    flags: list[str],
    limits: dict[str, float],
) -> tuple[dict[str, float], bool]:
    """({grade id: points}, whether something is left to grade by hand) of one submission, graded now or before.

    What the limits of an earlier grading stopped is graded again under other limits.
    Raises ValueError for what cannot be graded, RuntimeError with what stopped nbgrader, and what a gradebook raises.
    """
    if one.problem:
        raise ValueError(one.problem)
    note = course / "graded" / f"{one.name}.json"
    found = {"digest": digest(one, assignment), "student": one.student}
    earlier = json.loads(note.read_text()) if note.is_file() else {}
    if found.items() <= earlier.items() and earlier.get("limits", limits) == limits:
        flags[:] = dict.fromkeys([*flags, *earlier["flags"]])
    else:
        note.unlink(missing_ok=True)
        notebook, mended = repair(read_submission(one.notebook), release, one.student)
        flags += mended
        _hand_over(one, notebook, assignment, course)
        if stopped := nbgrader_course.autograde(course, assignment, one.name, SUBMISSION_SECONDS):
            raise RuntimeError(stopped)
        troubles = _troubles(course, assignment, one.name)
        flags += troubles
        kept = {"flags": flags[len(one.flags) :]} | ({"limits": limits} if troubles else {})
        write_text(note, json.dumps(found | kept) + "\n")
    points, by_hand, was_by_hand = nbgrader_course.points(course, assignment, one.name)
    if was_by_hand and (stopped := nbgrader_course.feedback(course, assignment, one.name, SUBMISSION_SECONDS)):
        flags.append(f"the feedback page is from before grading by hand: {stopped}")
    return points, by_hand


def _submitted(course: Path, one: Handed, assignment: Assignment) -> Path:
    return course / "submitted" / one.name / assignment.name


def _hand_over(one: Handed, notebook: NotebookNode, assignment: Assignment, course: Path) -> None:
    """Put the repaired notebook, and the runs that came with it, where nbgrader looks for submissions."""
    target = _submitted(course, one, assignment)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in files_with(one, assignment):
        copy = target / path.relative_to(one.notebook.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    nbformat.write(notebook, target / f"{assignment.name}.ipynb")


def _troubles(course: Path, assignment: Assignment, name: str) -> list[str]:
    """What stopped a cell from outside: time, memory. Read from the autograded notebook."""
    path = course / "autograded" / name / assignment.name / f"{assignment.name}.ipynb"
    flags = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if output.output_type != "error":
                continue
            trouble = TROUBLES.get(output.ename, "out of memory" if NO_MEMORY.search(output.evalue) else "")
            if trouble:
                where = marking(cell).get("grade_id", "a cell of the student's own")
                flags.append(f"{where}: {trouble}")
    return flags


def _write_feedback(result: Graded, assignment: Assignment, course: Path, name: str, page: Path) -> None:
    """nbgrader's page with the flags on top; a plain page where there is none."""
    source = nbgrader_course.feedback_page(course, assignment, name)
    told = [result.failure] * bool(result.failure) + result.flags
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in told)
    box = f"<div style='margin:1em 2em'><b>What was noticed</b><ul>{notes}</ul></div>" if told else ""
    if result.failure or not source.is_file():
        title = html.escape(f"{result.student}: assignment {assignment.number}")
        write_text(page, f"<!doctype html><meta charset='utf-8'><title>{title}</title><h1>{title}</h1>{box}\n")
        return
    text = source.read_text(encoding="utf-8")
    write_text(page, re.sub(r"<body[^>]*>", lambda m: m[0] + box, text, count=1))
