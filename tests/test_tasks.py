"""The eight tasks, their prompts, and what a record must have."""

import math

import pytest

from dora_lab.tasks import ANSWER_PREFIX, TASKS, Example, answer_words, parse_answer, parse_record, prompt, task

GOOD = {
    "instruction": "Please answer the following question with true or false, question: is ice cold?\n\n"
    "Answer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


def test_chance_is_one_over_the_candidates_and_the_eight_tasks_are_there():
    assert len(TASKS) == 8
    assert all(t.chance == 1 / len(t.candidates) for t in TASKS.values())
    assert task("ARC_EASY".lower()).folder == "ARC-Easy"


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'bool-q': choose one of boolq, .*winogrande"):
        task("bool-q")


def test_the_prompts_are_llm_adapters_and_its_short_form():
    example = parse_record(GOOD, task("boolq"), "x", "boolq-test-0")
    full, short = prompt(example, "alpaca"), prompt(example, "alpaca-short")
    assert full.startswith("Below is an instruction that describes a task.") and full.endswith(short)
    assert short == f"### Instruction:\n{GOOD['instruction']}\n\n### Response:\n"
    assert GOOD["output"] == ANSWER_PREFIX + example.answer


@pytest.mark.parametrize("count", [3, 4, 5])
def test_candidates_come_from_the_items_own_format_line(count):
    names = [f"answer{i + 1}" for i in range(count)]
    record = GOOD | {"instruction": f"Q\n\nAnswer format: {'/'.join(names)}", "answer": names[-1]}
    assert parse_record(record, task("arc_easy"), "x", "id").candidates == tuple(names)


@pytest.mark.parametrize(("listed", "named"), [(3, 4), (5, 4), (4, 4)])
def test_an_item_that_lists_other_options_than_its_format_line_has_those_it_lists(listed, named):
    options = " ".join(f"Answer{i + 1}: option" for i in range(listed))
    words = "/".join(f"answer{i + 1}" for i in range(named))
    record = GOOD | {"instruction": f"Q\n\n{options}\n\nAnswer format: {words}", "answer": f"answer{listed}"}
    assert len(parse_record(record, task("arc_easy"), "x", "id").candidates) == listed


def test_the_mixture_has_parts_and_takes_every_items_own_candidates():
    mixture = task("commonsense_170k")
    assert mixture.parts == tuple(TASKS) and math.isnan(mixture.chance)
    assert parse_record(GOOD, mixture, "x", "id").candidates == ("true", "false")
    with pytest.raises(ValueError, match="x, record 3: the instruction does not end in 'Answer format"):
        parse_record(GOOD | {"instruction": "is ice cold?"}, mixture, "x, record 3", "id")


@pytest.mark.parametrize(
    ("candidates", "text", "word"),
    [
        (("true", "false"), "the correct answer is false, not true", "false"),
        (("true", "false"), "untrue", "true"),  # as in the paper's evaluation
        (("true", "false"), "the correct answer is True", None),
        (("option1", "option2"), "option3 or option2", "option2"),
        (("answer1", "answer2", "answer3"), "answer5, or answer2", "answer5"),  # parsed, and wrong
        (("very", "very hot"), "it is very hot", "very hot"),
        (("ending1", "ending2"), "", None),
    ],
)
def test_the_first_answer_word_counts(candidates, text, word):
    assert parse_answer(text, Example("id", "q", candidates[0], candidates)) == word


def test_numbered_answers_are_looked_for_up_to_five():
    example = Example("id", "q", "answer1", ("answer1", "answer2", "answer3"))
    assert answer_words(example) == tuple(f"answer{i}" for i in range(1, 6))


def test_without_a_format_line_the_tasks_candidates_are_taken():
    record = GOOD | {"instruction": "is ice cold?"}
    assert parse_record(record, task("boolq"), "x", "id").candidates == ("true", "false")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected an object with instruction and answer, got list"),
        ({k: v for k, v in GOOD.items() if k != "answer"}, "field 'answer' is missing"),
        (GOOD | {"instruction": " "}, "field 'instruction' is missing or empty"),
        (GOOD | {"answer": True}, "field 'answer' is missing or empty"),
        (GOOD | {"answer": "maybe"}, "answer 'maybe' is not among the candidates true, false"),
    ],
)
def test_a_bad_record_is_named(record, message):
    with pytest.raises(ValueError, match=f"train.json, record 7: {message}"):
        parse_record(record, task("boolq"), "train.json, record 7", "id")
