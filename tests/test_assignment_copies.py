"""What submissions share: flagged where chance does not explain it, and never worth points."""

import json

import nbformat
import pytest
from answers import assignment_03

from dora_lab.assignments.build import cut, marking, stubbed
from dora_lab.assignments.catalogue import find_assignment
from dora_lab.assignments.copies import copies, normal_form
from dora_lab.assignments.repair import repair
from dora_lab.assignments.samples import filled

RIGHT = assignment_03.RIGHT["a03-forward"]
LONG = """\
def dora_forward(x, W0, bias, m, A, B, s):
    a, b = A.detach(), B.detach()
    n = ((W0**2).sum(1) + 2 * s * (b * (W0 @ a.T)).sum(1) + s**2 * ((b @ (a @ a.T)) * b).sum(1)).sqrt()
    V = W0 + s * B @ A
    return x @ (m / n * V.T).T + bias
"""
DISGUISED = {
    "as it is": LONG,
    "comments and layout": "# mine\n\n"
    + LONG.replace("    V =", "\n    # the sum\n    V =").replace(", bias", ",bias"),
    "a docstring and annotations": LONG.replace("s):\n", 's: float):\n    """All mine."""\n').replace(
        "x,", "x: object,", 1
    ),
    "imports": "import math\nimport torch\n\n" + LONG,
}


@pytest.mark.parametrize("disguise", DISGUISED)
def test_a_copy_has_the_same_form_in_disguise(disguise):
    assert normal_form(DISGUISED[disguise]) == normal_form(LONG) != ""


def test_renamed_variables_do_not_hide_a_copy():
    renamed = LONG.replace("V", "summed").replace("a, b = A", "p, q = A").replace("a.T", "p.T").replace("a @", "p @")
    renamed = renamed.replace("(b ", "(q ").replace("* b)", "* q)").replace("bias", "offset")
    assert normal_form(renamed) == normal_form(LONG)


def test_other_answers_have_other_forms():
    forms = [normal_form(source) for source in RIGHT.values()]
    assert len(set(forms)) == len(RIGHT)


@pytest.mark.parametrize(
    "source", ["", "x = (", "def f(x):\n    return x", "x = " + "-" * 3000 + "1", "x = " + "[" * 90]
)
def test_what_is_short_or_no_code_has_no_form(source):
    assert normal_form(source) == ""


@pytest.fixture
def class_of(tmp_path):
    chapter = cut(find_assignment("03"))

    def write(sources):
        paths = {}
        for student, source in sources.items():
            repaired, _ = repair(filled(chapter, student, {"a03-forward": source}), stubbed(chapter), student)
            assert any(marking(cell).get("grade_id") == "a03-forward" for cell in repaired.cells)
            paths[student] = tmp_path / student / "x.ipynb"
            paths[student].parent.mkdir()
            nbformat.write(repaired, paths[student])
        return paths

    return write


def test_two_who_hand_in_the_same_code_are_flagged_and_the_rest_is_not(class_of):
    others = dict(zip(("cy", "dan"), list(RIGHT.values())[3:5], strict=True))
    flags = copies(class_of({"ada": LONG, "bob": DISGUISED["imports"], **others}))
    assert flags == {
        "ada": ["a03-forward: the same code as bob"],
        "bob": ["a03-forward: the same code as ada"],
    }


def test_what_many_share_is_the_obvious_way(class_of):
    assert copies(class_of({f"student {number}": LONG for number in range(4)})) == {}


def test_stubs_are_no_copies(class_of):
    chapter = stubbed(cut(find_assignment("03")))
    stub = next(cell.source for cell in chapter.cells if marking(cell).get("grade_id") == "a03-forward")
    assert copies(class_of({"ada": stub, "bob": stub})) == {}


def _run(paths, student, run_id, shift=0.0):
    folder = paths[student].parent / "runs" / "mini" / run_id
    folder.mkdir(parents=True)
    rows = [{"id": f"q{i}", "log_likelihoods": {"a": -i / 7 - shift, "b": -i / 3 - shift}} for i in range(50)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_classmates_run_under_another_name_is_flagged(class_of):
    paths = class_of({student: "" for student in ("ada", "bob", "cy", "dan")})
    _run(paths, "ada", "boolq-lora-r2-s1-a")
    _run(paths, "bob", "boolq-lora-r2-s2-b", shift=5e-5)  # relabelled
    _run(paths, "cy", "boolq-lora-r2-s1-a")  # the same seed by chance, honestly the same run
    _run(paths, "dan", "boolq-lora-r2-s3-c", shift=0.01)
    (paths["dan"].parent / "runs" / "mini" / "broken").mkdir()
    (paths["dan"].parent / "runs" / "mini" / "broken" / "predictions.jsonl").write_text("[1]\n{")
    flags = copies(paths)
    assert flags["ada"] == ["the answers in boolq-lora-r2-s1-a are those in boolq-lora-r2-s2-b of bob"]
    assert len(flags["bob"]) == 2 and len(flags["cy"]) == 1 and "dan" not in flags
