"""What is handed in, whose it is, and what the table says when something goes wrong; nbgrader is stood in for."""

import csv
import gc
import sqlite3
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

from dora_lab.assignments import grade as grading
from dora_lab.assignments.build import cut, stubbed, student_copy
from dora_lab.assignments.catalogue import find_assignment
from dora_lab.assignments.collect import collect, files_with, which_assignment
from dora_lab.assignments.grade import grade
from dora_lab.assignments.repair import LARGEST_FILE, names_of, repair
from dora_lab.assignments.samples import answers, filled
from dora_lab.assignments.student import personal, personal_number
from dora_lab.assignments.table import Graded, write_grades

NAME = "03_dora_from_scratch.ipynb"
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
IDS = ("ada+lab@uni.edu", "O'Neil", DECOMPOSED, 'quoted "x"', "=1+1", "-7", "12/3".replace("/", "."), "Ada Lovelace")


@pytest.fixture(scope="module")
def chapter():
    return cut(find_assignment("03"))


@pytest.fixture
def copy(chapter):
    return nbformat.writes(student_copy(chapter))


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def stand_in(monkeypatch, chapter):
    """Grading without nbgrader: every submission gets one point, unless `broken` says otherwise."""
    course = grading.nbgrader_course
    broken = {}

    def step(name, value):
        def run(*arguments):
            if name in broken and any(broken[name][0] in str(argument) for argument in arguments):
                raise broken[name][1]
            return value

        return run

    def create(folder, *_):
        folder.mkdir(parents=True, exist_ok=True)
        return stubbed(chapter)

    monkeypatch.setattr(course, "create", create)
    monkeypatch.setattr(course, "autograde", step("autograde", ""))
    monkeypatch.setattr(course, "points", step("points", ({"a03-start-test": 1.0}, False, False)))
    monkeypatch.setattr(grading, "_troubles", lambda *_: [])
    monkeypatch.setattr(grading, "_write_feedback", step("feedback", None))
    return broken


def rows_of(table):
    return {row["student_id"]: row for row in csv.DictReader(table.open(newline=""))}


# Links


def test_links_are_not_followed_to_the_chapter_or_a_classmate(tmp_path, copy, stand_in):
    submissions = tmp_path / "in"
    put(submissions / "ada" / NAME, copy)
    for student, target in (("eve", find_assignment("03").source), ("bob", submissions / "ada" / NAME)):
        (submissions / student).mkdir()
        (submissions / student / NAME).symlink_to(target)
    (submissions / "carl.ipynb").symlink_to(submissions / "ada" / NAME)
    (submissions / "dan").symlink_to(submissions / "ada")
    put(submissions / "fay" / "mine.ipynb", copy)
    (submissions / "fay" / NAME).symlink_to(submissions / "ada" / NAME)
    found = {one.student: one for one in collect(submissions)}
    assert {s for s, one in found.items() if "is a link, which is not followed" in one.problem} == {
        *("eve", "bob", "carl", "dan"),
    }
    assert found["fay"].notebook.name == "mine.ipynb" and found["fay"].flags == (f"{NAME} is a link, not followed",)
    rows = rows_of(grade(submissions, tmp_path / "out", report=lambda line: None))
    assert rows["ada"]["score"] == rows["fay"]["score"] == "1"
    for student in ("eve", "bob", "carl", "dan"):
        assert rows[student]["score"] == "" and "not graded: what was handed in is a link" in rows[student]["flags"]


def test_runs_that_are_a_link_are_not_handed_in(tmp_path, copy):
    put(tmp_path / "ada" / "runs" / "mini" / "r" / "record.json", "{}")
    for student in ("ada", "eve", "bob"):
        put(tmp_path / student / "04_an_experiment.ipynb", copy)
    (tmp_path / "eve" / "runs").symlink_to(tmp_path / "ada" / "runs")
    (tmp_path / "bob" / "runs" / "mini").mkdir(parents=True)
    (tmp_path / "bob" / "runs" / "mini" / "r").symlink_to(tmp_path / "ada" / "runs" / "mini" / "r")
    found = {one.student: len(files_with(one, find_assignment("04"))) for one in collect(tmp_path)}
    assert found == {"ada": 1, "eve": 0, "bob": 0}


def test_what_archives_leave_is_no_submission(tmp_path, copy):
    put(tmp_path / "ada" / "dora.ipynb", copy)
    for litter in ("ada/._dora.ipynb", "ada/__MACOSX/._dora.ipynb", "__MACOSX/ada.ipynb", "._ada.ipynb"):
        put(tmp_path / litter, "\0")
    found = collect(tmp_path)
    assert [(one.student, one.notebook.name) for one in found] == [("ada", "dora.ipynb")]
    assert which_assignment(found).number == "03"


def test_who_handed_in_no_notebook_has_a_row_that_says_so(tmp_path, copy, stand_in):
    put(tmp_path / "in" / "ada" / NAME, copy)
    for place in ("bob/report.pdf", f"carl/{NAME}.txt", "dan.zip", "ada.zip", "fay.ipynb.txt", ".DS_Store"):
        put(tmp_path / "in" / place, "x")
    (tmp_path / "in" / "eve").mkdir()
    rows = rows_of(grade(tmp_path / "in", tmp_path / "out", report=lambda line: None))
    said = {student: (row["score"], row["flags"].split("; student_id")[0]) for student, row in rows.items()}
    assert said == {
        "ada": ("1", "ada.zip beside it, not graded"),
        "bob": ("", "not graded: no notebook in it: found report.pdf"),
        "carl": ("", f"not graded: no notebook in it: found {NAME}.txt"),
        "dan": ("", "not graded: no notebook: found dan.zip"),
        "eve": ("", "not graded: no notebook in it: it is empty"),
        "fay": ("", "not graded: no notebook: found fay.ipynb.txt"),
    }


def test_the_notebook_of_the_assignment_is_graded_and_the_others_are_flagged(tmp_path, copy):
    names = ("01_lora_from_scratch", "02_magnitude_and_direction", "02_magnitude_and_direction (1)")
    for name in names:
        put(tmp_path / "ada" / f"{name}.ipynb", nbformat.writes(student_copy(cut(find_assignment(name[:2])))))
    put(tmp_path / "bob" / "mine.ipynb", copy)
    put(tmp_path / "bob" / "02_magnitude_and_direction.ipynb", copy)
    for number, others in (("01", (1, 2)), ("02", (0, 2))):
        ada, bob = collect(tmp_path, find_assignment(number))
        assert ada.notebook.stem == names[int(number) - 1]
        assert set(ada.flags) == {f"{names[other]}.ipynb was handed in too, not graded" for other in others}
        assert f"{bob.notebook.name} is of assignment 03" in bob.flags
    assert collect(tmp_path, find_assignment("03"))[1].flags == ("mine.ipynb was handed in too, not graded",)


@pytest.mark.parametrize("place", ["out", "results/first", "."])
def test_grades_among_the_submissions_are_no_student(place, tmp_path, copy, stand_in):
    put(tmp_path / "ada" / NAME, copy)
    out = tmp_path / place
    for _ in range(2):
        assert set(rows_of(grade(tmp_path, out, report=lambda line: None))) == {"ada"}
        put(out / "course" / "autograded" / "ada" / NAME, copy)


def test_what_a_limit_stopped_is_graded_again_under_another(tmp_path, copy, stand_in, monkeypatch):
    for student in ("ada", "eve"):
        put(tmp_path / "in" / student / NAME, copy)
    graded = []
    monkeypatch.setattr(grading.nbgrader_course, "autograde", lambda c, a, name, s: graded.append(name) or "")
    monkeypatch.setattr(
        grading, "_troubles", lambda c, a, name: ["a03-start: over the time limit"] if name == "eve" else []
    )
    counts = []
    for limits in ({"seconds": 20}, {"seconds": 20}, {"seconds": 60}, {"seconds": 60, "memory_bytes": 2**30}):
        grade(tmp_path / "in", tmp_path / "out", report=lambda line: None, **limits)
        counts.append((graded.count("ada"), graded.count("eve")))
    assert counts == [(1, 1), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("TimeLimit", "it did not end", ["a03-start: over the time limit"]),
        ("SubmissionError", "MemoryError:  (line 1 of the cell)", ["a03-start: out of memory"]),
        ("SubmissionError", "RuntimeError: DefaultCPUAllocator: can't allocate memory", ["a03-start: out of memory"]),
        ("SubmissionError", "ValueError: no", []),
    ],
)
def test_what_was_stopped_for_time_or_memory_is_flagged(name, value, flag, tmp_path, chapter):
    notebook = stubbed(chapter)
    cell = next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == "a03-start")
    cell.outputs = [nbformat.v4.new_output("error", ename=name, evalue=value, traceback=[])]
    assignment = find_assignment("03")
    put(tmp_path / "autograded" / "ada" / assignment.name / f"{assignment.name}.ipynb", nbformat.writes(notebook))
    assert grading._troubles(tmp_path, assignment, "ada") == flag


def test_a_gradebook_that_was_not_finished_is_made_again(tmp_path, monkeypatch):
    made = []

    def run(course, arguments, seconds):
        made.append(arguments)
        (course / "gradebook.db").touch()
        return "stopped after 300 seconds" if len(made) == 1 else ""

    course = grading.nbgrader_course
    monkeypatch.setattr(course, "require_nbgrader", lambda: None)
    monkeypatch.setattr(course, "_run", run)
    arguments = (tmp_path / "course", find_assignment("03"), 20, 2**30, tmp_path)
    with pytest.raises(RuntimeError, match="could not make the gradebook: stopped after 300 seconds"):
        course.create(*arguments)
    for _ in range(2):
        course.create(*arguments)
    assert len(made) == 2


def test_a_file_that_is_too_large_is_not_read(tmp_path, copy, stand_in):
    put(tmp_path / "in" / "ada.ipynb", copy)
    with (tmp_path / "in" / "eve.ipynb").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    large = next(one for one in collect(tmp_path / "in") if one.student == "eve")
    assert large.problem == "eve.ipynb has 30 MiB: at most 30 are read"
    rows = rows_of(grade(tmp_path / "in", tmp_path / "out", report=lambda line: None))
    assert (rows["ada"]["score"], rows["eve"]["score"]) == ("1", "") and "at most 30" in rows["eve"]["flags"]


# Ids


@pytest.mark.parametrize("student", IDS)
def test_an_honest_id_of_any_kind_gets_its_own_numbers_and_no_flag(student, tmp_path, chapter):
    """The student types the id as the folder has it; the numbers come out as the grader's."""
    typed = student if '"' not in student else student.replace('"', '\\"')
    handed = filled(chapter, typed, answers(chapter, student))
    put(tmp_path / student / NAME, nbformat.writes(handed))
    one = collect(tmp_path)[0]
    assert one.student == unicodedata.normalize("NFC", student)
    repaired, flags = repair(nbformat.read(one.notebook, as_version=4), stubbed(chapter), one.student)
    assert flags == []
    namespace = {}
    for cell in repaired.cells:
        if cell.cell_type == "code":
            exec(cell.source, namespace)  # the typed-in numbers' test is among them
    assert all(part.isprintable() and part not in "/\\'\"+= " for part in one.name)


def test_an_id_counts_the_same_however_it_is_composed():
    assert personal(COMPOSED, "x", 4).equal(personal(f" {DECOMPOSED} ", "x", 4))
    assert personal_number(7, "x", 0, 10**6) == personal_number("7", "x", 0, 10**6)
    assert personal_number("7", "x", 0, 10**6) != personal_number("8", "x", 0, 10**6)


def test_the_table_has_the_ids_as_they_are_and_no_formulas(tmp_path, copy, stand_in):
    for student in IDS:
        put(tmp_path / "in" / student / NAME, copy)
    rows = rows_of(grade(tmp_path / "in", tmp_path / "out", report=lambda line: None))
    escaped = {f"'{student}" if student[0] in "=-" else unicodedata.normalize("NFC", student) for student in IDS}
    assert set(rows) == escaped
    assert {student: row["flags"] for student, row in rows.items() if row["score"] != "1"} == {}


@pytest.mark.parametrize("pair", [("a b", "a_b"), (COMPOSED, DECOMPOSED), ("ada", "ada.ipynb")])
def test_two_submissions_under_one_name_are_an_error_that_says_which(pair, tmp_path, copy):
    for place in pair:
        put(tmp_path / place if place.endswith("nb") else tmp_path / place / NAME, copy)
    with pytest.raises(ValueError, match="would be graded under one name: rename or remove all but one"):
        collect(tmp_path)


# Failures


def test_what_was_not_graded_has_no_score(tmp_path, chapter):
    failed = Graded("ada", {}, False, ["a flag"], "not graded: stopped after 600 seconds", 600)
    table = write_grades([failed], find_assignment("03"), stubbed(chapter), tmp_path / "grades.csv")
    row = rows_of(table)["ada"]
    assert {row[name] for name in ("score", "a03-start", "a03-forward", "a03-merge", "a03-numbers")} == {""}
    assert row["max_score"] == "20" and row["flags"] == "not graded: stopped after 600 seconds; a flag"


@pytest.mark.parametrize("step", ["autograde", "points", "feedback"])
def test_a_step_that_fails_for_one_student_stops_no_other(step, tmp_path, copy, stand_in):
    for student in ("ada", "bob", "eve"):
        put(tmp_path / "in" / student / NAME, copy)
    stand_in[step] = ("bob", sqlite3.OperationalError("database is locked"))
    rows = rows_of(grade(tmp_path / "in", tmp_path / "out", report=lambda line: None))
    assert rows["ada"]["score"] == rows["eve"]["score"] == "1"
    assert "OperationalError: database is locked" in rows["bob"]["flags"]
    assert rows["bob"]["score"] == ("1" if step == "feedback" else "")
    stand_in.clear()
    rows = rows_of(grade(tmp_path / "in", tmp_path / "out", report=lambda line: None))
    assert rows["bob"]["score"] == "1" and "locked" not in rows["bob"]["flags"]


def test_what_is_graded_stands_in_the_table_when_grading_is_interrupted(tmp_path, copy, stand_in):
    for student in ("ada", "bob", "eve"):
        put(tmp_path / "in" / student / NAME, copy)

    def stop(line):
        if line.startswith("[1/3]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade(tmp_path / "in", tmp_path / "out", jobs=1, report=stop)
    rows = rows_of(tmp_path / "out" / "grades.csv")
    assert rows["ada"]["score"] == "1" and rows["eve"]["score"] == ""
    assert "grading was stopped before its turn" in rows["eve"]["flags"]


def test_what_a_students_code_wrote_is_removed_when_it_is_graded(tmp_path, copy, stand_in, monkeypatch):
    put(tmp_path / "in" / "ada" / NAME, copy)

    def autograde(course, assignment, name, seconds):
        put(grading.nbgrader_course.work_folder(course, name) / "submission-x" / "big", "x")
        return "stopped after 600 seconds"

    monkeypatch.setattr(grading.nbgrader_course, "autograde", autograde)
    rows = rows_of(grade(tmp_path / "in", tmp_path / "out", report=lambda line: None))
    assert "not graded: stopped after 600 seconds" in rows["ada"]["flags"]
    assert list((tmp_path / "out" / "course" / "work").iterdir()) == []


class Yields:
    """A cycle whose collection, wherever it comes, lets another thread in."""

    def __init__(self):
        self.own = self

    def __del__(self):
        time.sleep(0)


def test_submissions_are_parsed_side_by_side():
    """Python 3.11 raises SystemError when two threads build syntax trees at once (cpython#106905)."""
    source = "\n".join(f"def f{i}(a, b):\n    return [x + {i} for x in (a, b, (1, (2, a)))]" for i in range(30))
    cell = nbformat.v4.new_code_cell(source)

    def names(_):
        Yields()
        return len(names_of(cell))

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.freeze()  # what was there before makes collections slow
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert set(pool.map(names, range(300))) == {30}
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.unfreeze()
