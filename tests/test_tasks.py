"""The eight tasks, their prompts, and what a record must have."""

import pytest

from dora_lab.tasks import ANSWER_PREFIX, TASKS, parse_record, prompt, task

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
