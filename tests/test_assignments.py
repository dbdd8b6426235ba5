"""Assignments from end to end: what students get, what is done with what comes back, and what it is given."""

import csv
import html.parser
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from dora_lab.assignments.build import SOLUTION, build, cut, is_test, marking, points_of, stubbed, student_copy
from dora_lab.assignments.catalogue import ASSIGNMENTS, find_assignment
from dora_lab.assignments.collect import collect, which_assignment
from dora_lab.assignments.experiment import own_seeds
from dora_lab.assignments.grade import grade
from dora_lab.assignments.repair import literals, names_of, read_submission, repair
from dora_lab.assignments.samples import answers, filled, write_samples

NUMBERS = [assignment.number for assignment in ASSIGNMENTS]
needs_nbgrader = pytest.mark.skipif(
    importlib.util.find_spec("nbgrader") is None, reason="nbgrader is not installed: pip install -e '.[grading]'"
)


@pytest.fixture(scope="module")
def notebooks():
    return {number: cut(find_assignment(number)) for number in NUMBERS}


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def solution_lines(notebook):
    """Every line that stands between BEGIN and END SOLUTION or in an answer graded by hand, and says something."""
    regions = []
    for cell in notebook.cells:
        if marking(cell).get("solution"):
            regions += [cell.source] if marking(cell)["grade"] else [m["body"] for m in SOLUTION.finditer(cell.source)]
    lines = [line.split("  #")[0].strip() for region in regions for line in region.splitlines()]
    return {line for line in lines if len(line) > 8 and not line.startswith("import ")}


@pytest.mark.parametrize("number", NUMBERS)
def test_no_line_of_a_solution_or_hidden_test_is_in_what_students_get(number, notebooks, tmp_path):
    build(find_assignment(number), tmp_path)
    solved = notebooks[number]
    lines = solution_lines(solved)
    assert len(lines) >= 5
    hidden = {
        line.strip()
        for cell in solved.cells
        if is_test(cell)
        for line in cell.source.split("### BEGIN HIDDEN TESTS")[1].split("### END HIDDEN TESTS")[0].splitlines()
        if len(line.strip()) > 12
    }
    visible = {line.strip() for cell in solved.cells if is_test(cell) for line in cell.source.splitlines()}
    assert hidden <= visible
    told = "\n".join(cell.source for cell in solved.cells if cell.cell_type == "markdown" and not marking(cell))
    secret = {line for line in lines | hidden if line not in told}
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        text = path.read_text(encoding="utf-8")
        found = nbformat.reads(text, as_version=4)
        flat = "\n".join([text, *(cell.source for cell in found.cells), json.dumps(found.metadata)])
        assert [line for line in secret if line in flat] == []
        assert not any(mark in flat for mark in ("BEGIN SOLUTION", "HIDDEN TESTS"))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_students_copy_has_points_ids_stubs_and_no_outputs(number, notebooks):
    copy = student_copy(notebooks[number])
    nbformat.validate(copy)
    assert points_of(copy) == points_of(notebooks[number]) and sum(points_of(copy).values()) == 20
    for cell in copy.cells:
        assert set(cell) <= {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        if marking(cell):
            assert marking(cell)["schema_version"] == 3 and cell.metadata.deletable is False
            assert cell.metadata.get("editable", True) is not marking(cell)["locked"]
    stubs = [cell.source for cell in copy.cells if marking(cell).get("solution") and cell.cell_type == "code"]
    assert all("NotImplementedError" in stub or " = ..." in stub or "figure here" in stub for stub in stubs)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("02", "Every other row, however short, has a direction of length one."),
        ("03", "W' = m\\,\\frac{V'}{\\lVert V'\\rVert}"),
        ("03", "arXiv 2402.09353"),
        ("03", "counts as a constant"),
        ("03", "Training may turn an entry of $m$ negative."),
    ],
)
def test_a_students_copy_says_what_is_tested(number, words, notebooks):
    assert words in "\n".join(cell.source for cell in student_copy(notebooks[number]).cells)


def test_the_command_for_a_run_holds_a_folder_with_blanks(notebooks, tmp_path, capsys):
    folder = tmp_path / "my runs"
    exec(by_id(notebooks["04"], "a04-setup").source, {"student_id": "ada", "runs_dir": str(folder)})
    command = capsys.readouterr().out.split("for example: ")[1]
    assert shlex.split(command)[-2:] == ["runs_dir", str(folder)]


@pytest.mark.parametrize("number", ["01", "02", "03"])
def test_a_students_copy_runs_to_its_first_exercise_on_torch_alone(number, notebooks, monkeypatch):
    for name in ("nbgrader", "dora_lab", "peft"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    namespace = {}
    for cell in code_of(student_copy(notebooks[number])):
        if is_test(cell):
            with pytest.raises(NotImplementedError, match="Return"):
                exec(cell.source, namespace)
            return
        exec(cell.source, namespace)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solved_copy_passes_its_own_tests(number, notebooks):
    student = "lesson" if number == "04" else "ada"
    given = answers(notebooks[number], student, runs_dir="")
    namespace = {}
    for cell in code_of(filled(notebooks[number], student, given)):
        if not marking(cell).get("solution") or not marking(cell)["grade"]:
            exec(cell.source, namespace)
    assert is_test(code_of(notebooks[number])[-1]) or number == "04"


def test_answers_differ_between_students(notebooks):
    for number in ("01", "02", "03"):
        own = {answers(notebooks[number], student)[f"a{number}-numbers"] for student in ("ada", "alan", "grace")}
        assert len(own) == 3
    assert own_seeds("ada") != own_seeds("alan") and len(set(own_seeds("ada"))) == 3


def test_a_chapter_whose_cells_are_marked_wrongly_is_refused(notebooks, monkeypatch, tmp_path):
    chapter = nbformat.read(find_assignment("03").source, as_version=4)
    test = next(cell for cell in chapter.cells if is_test(cell))
    test.source = test.source.replace("HIDDEN", "OPEN")
    broken = tmp_path / "chapter.ipynb"
    nbformat.write(chapter, broken)
    monkeypatch.setattr(type(find_assignment("03")), "source", broken)
    with pytest.raises(ValueError, match="a03-start-test has no hidden tests"):
        cut(find_assignment("03"))


# What comes back


def handed(notebooks, number="03", student="ada"):
    return filled(notebooks[number], student, answers(notebooks[number], student))


def by_id(notebook, grade_id):
    return next(cell for cell in notebook.cells if marking(cell).get("grade_id") == grade_id)


def mended(notebooks, submission):
    return repair(submission, stubbed(notebooks["03"]), "ada")


def test_an_untouched_submission_has_no_flags_and_keeps_its_answers(notebooks):
    submission = handed(notebooks)
    repaired, flags = mended(notebooks, submission)
    assert flags == [] and len(repaired.cells) == len(submission.cells)
    for cell in repaired.cells:
        if marking(cell).get("solution"):
            assert cell.source == by_id(submission, marking(cell)["grade_id"]).source


def _delete(submission):
    submission.cells.remove(by_id(submission, "a03-forward-test"))


def _edit(submission):
    by_id(submission, "a03-forward-test").source = "assert True"


def _points(submission):
    by_id(submission, "a03-forward-test").metadata.nbgrader.points = 800


def _lose_metadata(submission):
    by_id(submission, "a03-forward").metadata = {}


def _lose_everything(submission):
    for position, cell in enumerate(submission.cells):
        cell.metadata, cell.id = nbformat.from_dict({}), f"c{position}"


def _duplicate(submission):
    cell = by_id(submission, "a03-forward")
    place = submission.cells.index(cell)
    stub = nbformat.from_dict(cell)
    stub.source = "def dora_forward(*args):\n    return None\n"
    submission.cells.insert(place, stub)


def _other_types(submission):
    by_id(submission, "a03-forward").cell_type = "raw"
    by_id(submission, "a03-merge-test").metadata.nbgrader.grade_id = ["no", "text"]


def _unlock(submission):
    for cell in submission.cells:
        if marking(cell):
            marking(cell).update(locked=False, grade=False, solution=True)


DAMAGE = {
    "a test deleted": (_delete, "a03-forward-test: deleted, put back"),
    "a test edited": (_edit, "a03-forward-test: edited, put back"),
    "points changed": (_points, None),
    "an answer without metadata": (_lose_metadata, "a03-forward: metadata changed, found by its cell id"),
    "no metadata at all": (_lose_everything, "a03-forward: metadata lost, found by what it defines"),
    "an id twice": (_duplicate, "a03-forward: its id occurs 2 times, the last answer counts"),
    "cell types and ids of other kinds": (_other_types, "a03-forward: its cell type was changed, put back"),
    "everything unlocked": (_unlock, None),
}


@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_mended_from_the_release_and_flagged(damage, notebooks):
    change, expected = DAMAGE[damage]
    submission = handed(notebooks)
    whole, _ = mended(notebooks, submission)
    change(submission)
    repaired, flags = mended(notebooks, nbformat.reads(json.dumps(submission), as_version=4))
    assert expected is None or expected in flags
    for grade_id in (marking(cell)["grade_id"] for cell in whole.cells if marking(cell)):
        ours, theirs = by_id(whole, grade_id), by_id(repaired, grade_id)
        assert (ours.source, ours.cell_type, marking(ours)) == (theirs.source, theirs.cell_type, marking(theirs))


def test_a_deleted_answer_counts_as_not_answered(notebooks):
    submission = handed(notebooks)
    submission.cells.remove(by_id(submission, "a03-merge"))
    repaired, flags = mended(notebooks, submission)
    assert flags == ["a03-merge: deleted, counted as not answered"]
    assert "NotImplementedError" in by_id(repaired, "a03-merge").source


def test_cells_of_ones_own_stay_in_their_place_and_are_not_trusted(notebooks):
    submission = handed(notebooks)
    place = submission.cells.index(by_id(submission, "a03-forward"))
    own = nbformat.v4.new_code_cell("helper = 3", metadata={"course": {"run": "both"}, "tags": ["parameters"]})
    submission.cells.insert(place, own)
    repaired, flags = mended(notebooks, submission)
    following = repaired.cells.index(by_id(repaired, "a03-forward"))
    before = [cell for cell in repaired.cells[:following] if cell.source == "helper = 3"]
    assert flags == [] and len(before) == 1 and before[0].metadata == {"course": {"run": "submission", "names": []}}


@pytest.mark.parametrize(("said", "flagged"), [("ada", None), ("", "is not given"), ("alan", "is 'alan'")])
def test_a_submission_is_graded_as_whose_it_is(said, flagged, notebooks):
    submission = handed(notebooks)
    submission.cells[1].source = f'student_id = "{said}"'
    repaired, flags = mended(notebooks, submission)
    assert repaired.cells[1].source == "student_id = 'ada'"
    assert flags == [] if flagged is None else flagged in flags[0]


def _without_ids(submission, minor=0):
    """As Colab saves it: no cell ids, metadata of its own."""
    plain = json.loads(nbformat.writes(submission))
    plain["nbformat_minor"] = minor
    for number, cell in enumerate(plain["cells"]):
        del cell["id"]
        cell["metadata"]["id"] = f"Xy{number}"
    return json.dumps(plain)


def test_a_file_without_cell_ids_is_as_good_as_one_with(notebooks, tmp_path):
    (tmp_path / "colab.ipynb").write_text(_without_ids(handed(notebooks)))
    whole, _ = mended(notebooks, handed(notebooks))
    repaired, flags = mended(notebooks, read_submission(tmp_path / "colab.ipynb"))
    assert flags == [] and [cell.source for cell in repaired.cells] == [cell.source for cell in whole.cells]


def test_a_file_without_ids_or_metadata_keeps_its_answers_and_doubles_nothing(notebooks):
    submission = handed(notebooks)
    _lose_everything(submission)
    repaired, flags = mended(notebooks, submission)
    whole, _ = mended(notebooks, handed(notebooks))
    assert [cell.source for cell in repaired.cells] == [cell.source for cell in whole.cells]
    assert not any("student_id" in flag or "deleted" in flag for flag in flags)


TYPED = {
    "in a tuple": "a, b = 1.2, -3.4",
    "in a list": "[a, b] = [1.2, -3.4]",
    "annotated": "a: float = 1.2\nb: float = -3.4",
    "chained": "a = c = 1.2\nb = -3.4",
}


@pytest.mark.parametrize("style", TYPED)
def test_numbers_typed_in_in_any_form_are_literals(style, notebooks):
    submission = handed(notebooks)
    names = names_of(by_id(stubbed(notebooks["03"]), "a03-numbers"))
    source = re.sub(r"\b[ab]\b", lambda m: names["ab".index(m[0])], TYPED[style])
    by_id(submission, "a03-numbers").source = source
    repaired, flags = mended(notebooks, submission)
    cell = by_id(repaired, "a03-numbers")
    assert flags == [] and cell.source == source and cell.metadata["course"]["literal"]


@pytest.mark.parametrize(
    "source", ["a, b = f()", "a, b = 1, c", "a.b = 1", "a[0], b = 1, 2", "a: float", "a += 1", "f()"]
)
def test_what_is_not_typed_in_is_no_literal(source, notebooks):
    submission = handed(notebooks)
    by_id(submission, "a03-numbers").source = source
    assert mended(notebooks, submission)[1] == ["a03-numbers: computed instead of typed in, not counted"]


CHEATS = {
    "a comment alone": "# computed above",
    "nothing": "",
    "one of them": "{first} = 1.5",
    "another name": "something = 1.5",
}


@pytest.mark.parametrize("cheat", CHEATS)
@pytest.mark.parametrize(
    ("number", "name"), [("01", "numbers"), ("02", "numbers"), ("03", "numbers"), ("04", "runs"), ("04", "difference")]
)
def test_what_another_cell_computed_does_not_stand_for_what_is_typed_in(number, name, cheat, notebooks):
    """A cell of the student's own gives the names values, and the cell that is to hold them is cut down."""
    name = f"a{number}-{name}"
    given = answers(notebooks[number], "lesson", runs_dir="")
    submission = filled(notebooks[number], "lesson", given)
    cell = by_id(submission, name)
    names = names_of(by_id(stubbed(notebooks[number]), name))
    if cheat == "one of them" and len(names) == 1:
        return
    own = nbformat.v4.new_code_cell(cell.source.replace(" = ", " = 1 and ") if name != "a04-runs" else cell.source)
    submission.cells.insert(submission.cells.index(cell), own)
    cell.source = CHEATS[cheat].format(first=names[0])
    repaired, flags = repair(submission, stubbed(notebooks[number]), "lesson")
    missing = " and ".join(names[1:] if cheat == "one of them" else names)
    assert flags == [f"{name}: {missing} not typed in here, not counted"]
    with pytest.raises(ValueError, match="type the numbers in"):
        exec(by_id(repaired, name).source, {})


@pytest.mark.parametrize(
    "source", ["a = b = 2", "a, b = 2, 2", "[a, b] = (2, 2)", "a: int = 2\nb = 2", "b = 1; a = b = 2"]
)
def test_typed_in_values_are_read_from_the_text(source):
    assert literals(source) == {"a": 2, "b": 2}


PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "text <svg/onload=alert(1)> text",
    "<!-- --><iframe src='javascript:alert(1)'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "<javascript:alert(1)>",
    "$<script>alert(1)</script>$",
    "$$\n<img src=x onerror=alert(1)>\n$$",
    "`<script>alert(1)</script>`",
    "```\n<script>alert(1)</script>\n```",
    "<<script>script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "[x]: javascript:alert(1)\n\n[x]",
    "[x](JavaScript:alert(1))",
    "[x](javascript\\:alert(1))",
    "[x](java&#115;cript:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](<java\tscript:alert(1)>)",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==#alert(1))",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("place", ["an answer", "a cell of one's own", "a raw cell"])
def test_html_in_what_a_student_writes_is_shown_and_not_obeyed(payload, place, notebooks):
    exporters = pytest.importorskip("nbconvert.exporters")
    submission = filled(notebooks["04"], "ada", {})
    if place == "an answer":
        by_id(submission, "a04-paragraph").source = payload
    else:
        new = nbformat.v4.new_raw_cell if place == "a raw cell" else nbformat.v4.new_markdown_cell
        submission.cells.append(new(payload))
    repaired, _ = repair(submission, stubbed(notebooks["04"]), "ada")
    written = next(cell for cell in repaired.cells if "alert" in cell.source)
    page = exporters.HTMLExporter(template_name="basic").from_notebook_node(
        nbformat.v4.new_notebook(cells=[nbformat.from_dict(written)])
    )[0]
    tags = _Tags()
    tags.feed(page)
    assert not tags.found & {"script", "svg", "iframe", "svg/onload", "form", "style", "math", "mglyph"}
    assert not tags.scripted


class _Tags(html.parser.HTMLParser):
    """Elements of a page, and attributes that run something."""

    def __init__(self):
        super().__init__()
        self.found, self.scripted = set(), []

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.scripted += [(tag, k) for k, v in attrs if k.startswith("on") or self.runs(v or "")]

    @staticmethod
    def runs(address):  # as a browser reads it: without control characters; %09 is none to it
        return re.sub(r"[\x00-\x20]", "", address).lower().startswith(("javascript:", "data:"))


def test_what_looks_like_mathematics_stays(notebooks):
    submission = filled(notebooks["04"], "ada", {})
    text = "> a quotation: $a < b$, $a<b$ and `x <= y`, so 3<4 & \\alpha"
    by_id(submission, "a04-paragraph").source = text
    repaired, _ = repair(submission, stubbed(notebooks["04"]), "ada")
    assert by_id(repaired, "a04-paragraph").source == text.replace("a<b", "a< b")


@pytest.mark.parametrize(
    "text", ["", "{nope", "[]", '{"cells": 3}', '{"nbformat": 4, "cells": [{"source": 1}]}', "\x00"]
)
def test_what_is_no_notebook_is_named(text, tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_text(text)
    with pytest.raises(ValueError, match="x.ipynb is not a notebook"):
        read_submission(path)


def test_submissions_are_found_by_folder_or_file(tmp_path, notebooks):
    for place in ("ada/03_dora_from_scratch.ipynb", "ada/a_draft.ipynb", "alan.ipynb", "b/.ipynb_checkpoints/x.ipynb"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(student_copy(notebooks["03"]), tmp_path / place)
    (tmp_path / "=1+1 [x]").mkdir()
    shutil.copy(tmp_path / "alan.ipynb", tmp_path / "=1+1 [x]" / "hand_in.ipynb")
    found = collect(tmp_path)
    assert [(one.student, one.name, one.notebook.name) for one in found] == [
        ("=1+1 [x]", "_1_1__x_", "hand_in.ipynb"),
        ("ada", "ada", "03_dora_from_scratch.ipynb"),
        ("alan", "alan", "alan.ipynb"),
        ("b", "b", "b"),
    ]
    assert [one.problem for one in found] == ["", "", "", "no notebook in it: it is empty"]
    assert found[1].flags == ("a_draft.ipynb was handed in too, not graded",)
    assert which_assignment(found).number == "03"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no notebooks in"):
        collect(tmp_path / "empty")


# What is asked for


@pytest.mark.parametrize(
    "shift", [(0.02, 0), (-0.02, 0), (0, 1), (0, -1), (1, 0), (0, 100), (-1, 2), (5, 5), (0.1, 0), (0.14, 0), (0, -20)]
)
def test_what_the_runs_say_is_asked_for_exactly(shift, notebooks):
    source = by_id(stubbed(notebooks["04"]), "a04-difference-test").source
    solution = by_id(notebooks["04"], "a04-difference").source + by_id(notebooks["04"], "a04-runs").source
    namespace = {"student_id": "lesson", "runs_dir": ""}
    exec(by_id(notebooks["04"], "a04-setup").source, namespace)
    exec(solution, namespace)
    exec(source, namespace)
    namespace["difference_pp"] += shift[0]
    namespace["discordant"] += shift[1]
    with pytest.raises(AssertionError, match="is not what your runs say"):
        exec(source, namespace)


def numbers_in(value):
    """Every number in lists, tuples, dicts and tensors."""
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for part in value for number in numbers_in(part)]
    return [float(value)] if isinstance(value, int | float) else []


def of_setup(namespace, given):
    """What a student has at hand after the set-up: its values, those in its dicts, and the id."""
    values = [namespace[name] for name in given if not callable(namespace[name]) and not name.startswith("__")]
    values += [part for value in values if isinstance(value, dict) for part in value.values()]
    return [value for value in values if isinstance(value, int | float | str | list | dict | torch.Tensor | Path)]


@pytest.mark.parametrize("number", NUMBERS)
def test_nothing_that_the_set_up_gives_computes_what_is_asked_for(number, notebooks):
    """Every function of the set-up, called with what an exercise has at hand, gives no number of a reference."""
    notebook, namespace = notebooks[number], {"student_id": "lesson", "runs_dir": ""}
    exec(by_id(notebook, f"a{number}-setup").source, namespace)
    given = set(namespace) - {"__builtins__", "run", "place"}
    at_hand = [*of_setup(namespace, given), "W0"]
    test = f"a{number}-difference-test" if number == "04" else f"a{number}-numbers-test"
    for cell in code_of(notebook):
        name = marking(cell).get("grade_id", "")
        if name and not name.endswith(("-setup", "-figure")) and (name == test or not is_test(cell)):
            exec(cell.source, namespace)
    wanted = [float(value) for value in namespace["reference"].values()]
    at_hand += [namespace["arms"]] if number == "04" else []
    succeeded = set()
    assert not given & {"paired", "reference"}
    for name in given:
        if callable(namespace[name]):
            for count in (1, 2, 3):
                for arguments in itertools.permutations(at_hand, count):
                    try:
                        result = namespace[name](*arguments)
                    except Exception:
                        continue
                    succeeded.add(name)
                    assert [w for w in wanted if w in numbers_in(result)] == [], (name, arguments)
    assert succeeded >= ({"own_seeds", "examine"} if number == "04" else {"close", "same_number", "personal"})


# The whole path


@needs_nbgrader
@pytest.mark.slow
def test_right_half_right_hostile_and_damaged_submissions_get_what_they_deserve(tmp_path, notebooks):
    assignment = find_assignment("03")
    build(assignment, tmp_path / "students")
    write_samples(assignment, tmp_path / "handed_in", lambda line: None)
    noisy = handed(notebooks, student="noisy")
    by_id(noisy, "a03-merge").source = "import sys, warnings\n" + by_id(noisy, "a03-merge").source.replace(
        "    ### BEGIN", "    print('x' * 99, file=sys.stderr), warnings.warn('look')\n    ### BEGIN"
    )
    endless = handed(notebooks, student="endless")
    by_id(endless, "a03-forward").source = "def dora_forward(*args):\n    while True:\n        pass\n"
    sneaky = handed(notebooks, student="sneaky")  # its own cell makes the numbers right whatever is typed in
    by_id(sneaky, "a03-numbers").source = "gain_of_row = merged_entry = 1.5\n"
    trace = "import sys\n\n\ndef trace(frame, *rest):\n    frame.f_globals.update(right)\n    return trace\n\n\n"
    true = answers(notebooks["03"], "sneaky")["a03-numbers"]
    own = nbformat.v4.new_code_cell(f"right = {{}}\nexec({true!r}, {{}}, right)\n{trace}sys.settrace(trace)")
    sneaky.cells.insert(sneaky.cells.index(by_id(sneaky, "a03-numbers")), own)
    for name, submission in (("noisy", noisy), ("endless", endless), ("sneaky", sneaky)):
        (tmp_path / "handed_in" / name).mkdir()
        nbformat.write(submission, tmp_path / "handed_in" / name / f"{assignment.name}.ipynb")
    said = []
    table = grade(tmp_path / "handed_in", tmp_path / "out", seconds=20, report=said.append)

    rows = {row["student_id"]: row for row in csv.DictReader(table.open())}
    exercises = ("a03-start", "a03-forward", "a03-merge", "a03-numbers")
    assert {rows["sample-broken"][name] for name in ("score", *exercises)} == {""}
    assert "not graded" in rows["sample-broken"]["flags"]
    graded = {student: row for student, row in rows.items() if student != "sample-broken"}
    points = {student: tuple(int(row[name]) for name in exercises) for student, row in graded.items()}
    assert points == {
        "endless": (3, 0, 5, 4),
        "noisy": (3, 8, 5, 4),
        "sample-damaged": (3, 8, 5, 4),
        "sample-half": (0, 8, 5, 4),
        "sample-hostile": (0, 0, 0, 0),
        "sample-right": (3, 8, 5, 4),
        "sneaky": (3, 8, 5, 0),
    }
    for student, row in graded.items():
        assert (int(row["score"]), row["max_score"]) == (sum(points[student]), "20"), student
    assert rows["sample-right"]["flags"] == rows["noisy"]["flags"] == ""
    assert "a03-forward-test: over the time limit" in rows["endless"]["flags"]
    assert "put back" in rows["sample-damaged"]["flags"]
    assert list((tmp_path / "out" / "course" / "work").iterdir()) == []
    assert sum("/8]" in line for line in said) == 8

    hidden = "is not the one of Sec. 4.3"
    for student in rows:
        page = (tmp_path / "out" / "feedback" / f"{student}.html").read_text()
        assert student in page and hidden not in page and "BEGIN HIDDEN" not in page
    again = []
    before = table.read_text()
    assert grade(tmp_path / "handed_in", tmp_path / "out", seconds=20, report=again.append).read_text() == before
    assert all(line.endswith("(0 s)") for line in again if "/8]" in line)


@needs_nbgrader
@pytest.mark.slow
def test_an_experiment_is_graded_from_the_runs_handed_in_with_it(tmp_path, notebooks):
    assignment = find_assignment("04")
    given = answers(notebooks["04"], "lesson", runs_dir="")
    folder = tmp_path / "handed_in" / "lesson"
    folder.mkdir(parents=True)
    nbformat.write(filled(notebooks["04"], "lesson", given), folder / f"{assignment.name}.ipynb")
    unanswered = student_copy(notebooks["04"])
    (tmp_path / "handed_in" / "idle").mkdir()
    nbformat.write(unanswered, tmp_path / "handed_in" / "idle" / f"{assignment.name}.ipynb")
    table = grade(tmp_path / "handed_in", tmp_path / "out", report=lambda line: None)
    rows = {row["student_id"]: row for row in csv.DictReader(table.open())}
    assert (rows["lesson"]["a04-runs"], rows["lesson"]["a04-difference"]) == ("6", "4")
    assert rows["lesson"]["to_grade_by_hand"] == "yes" and rows["lesson"]["score"] == "10"
    assert rows["idle"]["score"] == "0" and rows["idle"]["to_grade_by_hand"] == "no"

    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{tmp_path / 'out' / 'course' / 'gradebook.db'}", "dora-lab") as book:
        for name, points in (("a04-question", 3), ("a04-figure", 1.5), ("a04-paragraph", 4)):
            by_hand = book.find_grade(name, assignment.name, assignment.name, "lesson")
            by_hand.manual_score, by_hand.needs_manual_grade = points, False
        book.db.commit()
    table = grade(tmp_path / "handed_in", tmp_path / "out", report=lambda line: None)
    rows = {row["student_id"]: row for row in csv.DictReader(table.open())}
    assert (rows["lesson"]["score"], rows["lesson"]["to_grade_by_hand"]) == ("18.5", "no")
    assert "18.5" in (tmp_path / "out" / "feedback" / "lesson.html").read_text()


def test_without_nbgrader_grading_says_what_to_install(tmp_path, monkeypatch, notebooks):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    nbformat.write(student_copy(notebooks["03"]), tmp_path / "ada.ipynb")
    with pytest.raises(RuntimeError, match=r"pip install -e '\.\[grading\]'"):
        grade(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("assignment", ASSIGNMENTS, ids=NUMBERS)
def test_the_instructors_page_has_points_hours_and_mistakes(assignment, notebooks):
    page = assignment.guide.read_text()
    worth = points_of(notebooks[assignment.number])
    assert f"{sum(worth.values())} points, {assignment.hours} hours" in page
    for name, points in worth.items():
        assert f"| {name.removesuffix('-test')} | {points} |" in page
    assert page.split("## Common mistakes")[1].count("\n- ") >= 5
