"""Task files: splits that do not meet, stable ids, and errors that name file and place."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from dora_lab.data import IGNORED, data_sha256, load_examples, shortened, tokenized
from dora_lab.tasks import prompt


def test_ids_say_where_an_example_comes_from(tiny_data):
    examples = load_examples(str(tiny_data), "boolq", "test")
    assert [e.id for e in examples] == [f"boolq-test-{i}" for i in range(24)]
    assert load_examples(str(tiny_data), "boolq", "test", limit=5) == examples[:5]


def test_validation_is_carved_off_train_where_there_is_no_file(tiny_data):
    train, validation = (
        load_examples(str(tiny_data), "winogrande", split, validation_examples=10) for split in ("train", "validation")
    )
    ids = {e.id for e in train} | {e.id for e in validation}
    assert (len(train), len(validation), len(ids)) == (30, 10, 40)
    assert validation == load_examples(str(tiny_data), "winogrande", "validation", validation_examples=10)
    assert all(e.id.startswith("winogrande-train-") for e in validation)


def test_a_validation_file_leaves_train_whole(tiny_data):
    assert len(load_examples(str(tiny_data), "boolq", "train", validation_examples=10)) == 40
    validation = load_examples(str(tiny_data), "boolq", "validation", validation_examples=10)
    assert [e.id for e in validation] == [f"boolq-validation-{i}" for i in range(10)]


def test_the_mini_world_is_read_like_any_folder():
    for task in ("boolq", "hellaswag", "winogrande"):
        test = load_examples("mini-world", task, "test")
        train = {e.instruction for e in load_examples("mini-world", task, "train")}
        assert len(test) >= 500 and not train & {e.instruction for e in test}


@pytest.fixture
def copied(tiny_data, tmp_path):
    return shutil.copytree(tiny_data, tmp_path / "data")


def test_the_hash_moves_with_content_and_not_with_place(tiny_data, copied):
    before = data_sha256(str(copied), "boolq")
    assert before == data_sha256(str(tiny_data), "boolq") != data_sha256(str(tiny_data), "winogrande")
    path = copied / "boolq" / "train.json"
    path.write_text(path.read_text().replace("heavy", "weighty", 1))
    assert data_sha256(str(copied), "boolq") != before


def test_missing_places_are_named(tiny_data, copied):
    with pytest.raises(FileNotFoundError, match="/nowhere does not exist"):
        load_examples("/nowhere", "boolq", "test")
    (copied / "boolq" / "test.json").unlink()
    with pytest.raises(FileNotFoundError, match="boolq/test.json does not exist: put .* there"):
        load_examples(str(copied), "boolq", "test")
    with pytest.raises(FileNotFoundError, match="piqa/train.json does not exist"):
        load_examples(str(copied), "piqa", "train")
    with pytest.raises(FileNotFoundError, match="piqa has none of"):
        data_sha256(str(copied), "piqa")
    with pytest.raises(ValueError, match="unknown split 'dev': choose one of train, validation, test"):
        load_examples(str(tiny_data), "boolq", "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a",}]', r"test.json is not valid JSON \(.*line 1 column 2"),
        (
            '[{"instruction": "a b", "answer": "true"}, {"instruction": "a b", "answer": "false"},\n {"instr',
            r"test.json is not valid JSON \(.*line 2 .*in record 2\): fetch or restore",
        ),
        ("", r"test.json is not valid JSON \(.*in record 0\)"),
        (b"\xff\xfe[", "test.json is not valid JSON"),
        ("{}", "test.json: expected a non-empty list of records, got dict"),
        ("[]", "test.json: expected a non-empty list of records"),
        ('[{"instruction": "a b", "answer": "maybe"}]', "test.json, record 0: answer 'maybe' is not among"),
        ('[{"instruction": "a b"}]', "test.json, record 0: field 'answer' is missing"),
    ],
)
def test_a_bad_file_is_named_with_the_place(copied, content, message):
    path = copied / "boolq" / "test.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_examples(str(copied), "boolq", "test")


def test_too_few_examples_to_hold_some_back(tiny_data):
    with pytest.raises(ValueError, match="has 40 examples, too few to hold 40 back for validation"):
        load_examples(str(tiny_data), "winogrande", "train", validation_examples=40)


def test_the_loss_sees_the_answer_and_only_the_answer(tiny_data, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    examples = load_examples(str(tiny_data), "boolq", "train")
    rows, count = tokenized(tokenizer, examples, "alpaca-short", append_eos=True, cutoff_tokens=64)
    assert count == 0 and len(rows) == len(examples)
    for row, example in zip(rows, examples, strict=True):
        seen = [token for token in row["labels"] if token != IGNORED]
        assert tokenizer.decode(seen).split() == ["the", "correct", "answer", "is", example.answer, "</s>"]
        assert row["input_ids"][-len(seen) :] == seen


def test_a_long_prompt_loses_its_beginning_and_never_its_answer(tiny_data, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    examples = load_examples(str(tiny_data), "boolq", "train")
    whole, _ = tokenized(tokenizer, examples, "alpaca-short", append_eos=False, cutoff_tokens=64)
    rows, count = tokenized(tokenizer, examples, "alpaca-short", append_eos=False, cutoff_tokens=16)
    assert count == len(rows) and all(a["input_ids"][-16:] == b["input_ids"] for a, b in zip(whole, rows, strict=True))
    with pytest.raises(ValueError, match="cutoff_tokens 4 is too small: an answer alone has 5"):
        tokenized(tokenizer, examples, "alpaca-short", append_eos=False, cutoff_tokens=4)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        tokenized(tokenizer, examples, "alpaca-short", append_eos=True, cutoff_tokens=64)


def test_a_share_of_the_examples_ends_where_its_answer_begins(tiny_data, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    examples = load_examples(str(tiny_data), "boolq", "train")
    reading = (tokenizer, examples, "alpaca-short", True, 64, True, "prompt")
    (whole, none), (rows, count), (again, _) = (tokenized(*reading, share) for share in (0.0, 0.3, 0.3))
    cut = [i for i, (a, b) in enumerate(zip(whole, rows, strict=True)) if a != b]
    assert none == 0 and count == len(cut) == round(0.3 * len(rows)) and rows["input_ids"] == again["input_ids"]
    for i in cut:
        assert rows[i]["labels"] == rows[i]["input_ids"] == tokenizer(prompt(examples[i], "alpaca-short"))["input_ids"]


def test_shortening_keeps_the_begin_token():
    assert shortened([1, 5, 6, 7], 3, bos_token_id=1) == [1, 6, 7]
    assert shortened([4, 5, 6, 7], 3, bos_token_id=1) == [5, 6, 7]
    assert shortened([1, 5, 6], 3, bos_token_id=1) == [1, 5, 6]


def test_json_numbers_and_words_survive(copied):
    records = json.loads((copied / "boolq" / "test.json").read_text())
    records[0]["instruction"] = "is “ice” cold — naïve?\n\nAnswer format: true/false"
    (copied / "boolq" / "test.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert load_examples(str(copied), "boolq", "test")[0].instruction == records[0]["instruction"]
