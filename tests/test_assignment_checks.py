"""The hidden tests of every graded exercise: right answers in any style pass, mistakes and cheats do not.

An answer is run as grading runs it: the cell in a worker of its own, the test here.
"""

import nbformat
import pytest
from answers import CHEATS, HABITS, assignment_01, assignment_02, assignment_03

from dora_lab.assignments.build import cut, is_test, marking, stubbed
from dora_lab.assignments.catalogue import find_assignment
from dora_lab.assignments.isolation import Submission
from dora_lab.assignments.repair import names_of, repair
from dora_lab.assignments.samples import answers, filled

pytestmark = pytest.mark.slow  # some minutes of small cases, each with a process of its own

ANSWERS = {"01": assignment_01, "02": assignment_02, "03": assignment_03}
FUNCTIONS = [(number, name) for number, module in ANSWERS.items() for name in module.RIGHT]
STUDENT = "grace"


class Bench:
    """One assignment set up for one student: `accepts(grade id, source)` says what grading would."""

    def __init__(self, number):
        self.notebook = stubbed(cut(find_assignment(number)))
        self.cells = {marking(cell)["grade_id"]: cell for cell in self.notebook.cells if marking(cell)}
        self.submission = Submission(seconds=60)
        self.setup = f"student_id = {STUDENT!r}\n" + self.cells[f"a{number}-setup"].source
        self.submission.run(self.setup, quiet=True)

    def failure(self, name, source):
        """What the test says of this answer; "" where it is accepted."""
        namespace = {}
        exec(self.setup, namespace)
        try:
            self.submission.bind(source, names_of(self.cells[name]), namespace)
        except Exception:  # as in a notebook: the next cell runs all the same
            pass
        try:
            exec(self.cells[f"{name}-test"].source, namespace)
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return ""


@pytest.fixture(scope="module")
def bench():
    benches = {number: Bench(number) for number in ANSWERS}
    yield benches
    for one in benches.values():
        one.submission.close()


@pytest.mark.parametrize(("number", "name"), FUNCTIONS)
def test_five_styles_of_right_answers_are_accepted(bench, number, name):
    right = ANSWERS[number].RIGHT[name]
    refused = {style: why for style, source in right.items() if (why := bench[number].failure(name, source))}
    assert len(set(right.values())) >= 5 and refused == {}


@pytest.mark.parametrize(("number", "name"), FUNCTIONS)
def test_habits_of_notebooks_cost_a_right_answer_nothing(bench, number, name):
    function, right = names_of(bench[number].cells[name])[0], next(iter(ANSWERS[number].RIGHT[name].values()))
    written = {habit: text.replace("{name}", function).replace("{answer}", right) for habit, text in HABITS.items()}
    assert {habit: why for habit, source in written.items() if (why := bench[number].failure(name, source))} == {}


@pytest.mark.parametrize(("number", "name"), FUNCTIONS)
def test_no_wrong_answer_and_no_cheat_is_accepted(bench, number, name):
    function = names_of(bench[number].cells[name])[0]
    wrong = ANSWERS[number].WRONG[name]
    cheats = {kind: source.replace("{name}", function) for kind, source in CHEATS.items()}
    said = {kind: bench[number].failure(name, source) for kind, source in (wrong | cheats).items()}
    assert len(set(wrong.values())) >= 10 and [kind for kind, why in said.items() if not why] == []


@pytest.mark.parametrize(("number", "name"), FUNCTIONS)
def test_the_stub_is_refused_with_what_to_write(bench, number, name):
    stub = bench[number].cells[name].source
    assert "NotImplementedError" in bench[number].failure(name, stub) and "return" in stub.lower()


def test_the_chapters_own_answers_are_accepted(bench):
    for number, one in bench.items():
        given = answers(cut(find_assignment(number)), STUDENT)
        assert {name for name in given if one.failure(name, given[name])} == set()


@pytest.mark.parametrize("number", ANSWERS)
def test_typed_in_numbers_are_ones_own_and_precise(bench, number):
    name, one = f"a{number}-numbers", bench[number]
    notebook = cut(find_assignment(number))
    own, others = answers(notebook, STUDENT)[name], answers(notebook, "alan")[name]
    lesson = answers(notebook, "lesson")[name]
    values = dict(line.split(" = ") for line in own.splitlines())
    (first, a), (second, b) = values.items()
    right = {
        "seven digits": own,
        "other order": f"{second} = {b}\n{first} = {a}\n",
        "on one line": f"{first} = {a}; {second} = {b}",
        "scientific": f"{first} = {float(a):.6e}\n{second} = {float(b):.6e}\n",
        "five digits, with comments": f"# mine\n{first} = {float(a):.5g}\n{second} = {float(b):.5g}  # rounded\n",
    }
    wrong = {
        "another student's": others,
        "the lesson's": lesson,
        "exchanged": f"{first} = {b}\n{second} = {a}\n",
        "as texts": f"{first} = '{a}'\n{second} = '{b}'\n",
        "in a tuple": f"{first} = ({a},)\n{second} = ({b},)\n",
        "one is missing": f"{first} = {a}\n",
        "one percent off": f"{first} = {a}\n{second} = {1.01 * float(b)}\n",
        "no number": f"{first} = float('nan')\n{second} = float('nan')\n",
        "infinite": f"{first} = 1e999\n{second} = 1e999\n",
        "true": f"{first} = True\n{second} = True\n",
        "two digits": f"{first} = {a}\n{second} = {float(b):.0e}\n",
        "the negative": f"{first} = {a}\n{second} = {-float(b)}\n",
        "a stub": f"{first} = ...\n{second} = ...\n",
    }
    assert {style: why for style, source in right.items() if (why := one.failure(name, source))} == {}
    assert [kind for kind, source in wrong.items() if not one.failure(name, source)] == []


@pytest.mark.parametrize("number", ANSWERS)
def test_numbers_that_are_computed_in_the_cell_are_not_counted(number):
    notebook = cut(find_assignment(number))
    given = answers(notebook, STUDENT)
    name = f"a{number}-numbers"
    given[name] = "\n".join(line.replace(" = ", " = 1 * ") for line in given[name].splitlines())
    repaired, flags = repair(filled(notebook, STUDENT, given), stubbed(notebook), STUDENT)
    assert flags == [f"{name}: computed instead of typed in, not counted"]
    cell = next(cell for cell in repaired.cells if marking(cell).get("grade_id") == name)
    with pytest.raises(ValueError, match="type the numbers in"):
        exec(cell.source, {})


def test_tests_draw_other_inputs_every_time(bench):
    """What a function is called with in the hidden part differs from one grading to the next."""
    seen = []
    for _ in range(2):
        calls = []
        namespace = {"lora_start": lambda W0, rank, calls=calls: (calls.append(W0.clone()), (1 / 0))}
        exec(bench["01"].setup, namespace)
        source = bench["01"].cells["a01-start-test"].source
        hidden = source[source.index("### BEGIN HIDDEN TESTS") :]
        with pytest.raises(ZeroDivisionError):
            exec(hidden, namespace)
        seen.append(calls[0])
    assert not seen[0].equal(seen[1])


def test_every_graded_exercise_has_its_answers_here():
    for number, module in ANSWERS.items():
        notebook = cut(find_assignment(number))
        tests = {marking(cell)["grade_id"].removesuffix("-test") for cell in notebook.cells if is_test(cell)}
        assert tests == set(module.RIGHT) | {f"a{number}-numbers"} and set(module.RIGHT) == set(module.WRONG)
        nbformat.validate(notebook)
