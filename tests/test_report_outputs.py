"""The report's raw outputs and its prompt: read, compared, cut, as on hand-made texts and on the real files."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import nbformat
import pytest

from dora_lab.data import load_examples
from dora_lab.fetch import llm_adapters_folder
from dora_lab.pipeline import run_chapter
from dora_lab.report_outputs import (
    FILES,
    Output,
    compare,
    fetch_outputs,
    first_match,
    kinds,
    local_outputs,
    outputs_folder,
    read_outputs,
    right_by_id,
    stated_answer,
    unread_ids,
)
from dora_lab.report_recipe import (
    answers_lost,
    border,
    evaluation_text,
    load_tokenizer,
    token_counts,
    tokenizer_path,
    training_text,
)
from dora_lab.tasks import Example

EXAMPLE = Example("winogrande-test-0", "Fill in: _ is red.\n\nOption1: a Option2: b Answer format: option1/option2",
                  "option2", ("option1", "option2"))  # fmt: skip


def output(number, gold, text, recorded=""):
    return Output(f"winogrande-test-{number}", f"question {number}", gold, text, recorded)


@pytest.mark.parametrize(
    ("text", "first", "stated"),
    [
        ("the correct answer is option2", "option2", "option2"),
        ("### Correct answer: option1", "option1", "option1"),
        ("### Log:\n                The correct answer is option2", "option2", "option2"),
        ("option1", "option1", "option1"),
        ("option1/option2", "option1", None),
        ("option2/option1\n\nOption1: option2/option1", "option2", None),
        ("### Correct answer: option2\n\nOption1: option1 Option2: option2", "option2", "option2"),
        ("the correct answer is option1/option2", "option1", None),
        ("the correct answer is option1, the answer is option2", "option1", None),
        ("the correct answer is", None, None),
        ("", None, None),
        ("222222", None, None),
    ],
)
def test_two_ways_to_read_an_output(text, first, stated):
    assert (first_match(text), stated_answer(text)) == (first, stated)


def test_unread_answers_are_wrong_and_can_be_set_aside():
    lora = [output(0, "option1", "option1"), output(1, "option1", ""), output(2, "option2", "option1")]
    dora = [output(0, "option1", "option2"), output(1, "option1", "option1"), output(2, "option2", "option2")]
    assert right_by_id(lora, first_match) == {f"winogrande-test-{i}": i == 0 for i in range(3)}
    assert unread_ids(lora, first_match) == {"winogrande-test-1"}
    whole, out = compare(dora, lora, first_match)
    assert (whole.n, whole.first_only, whole.second_only, out) == (3, 2, 1, 0)
    both, out = compare(dora, lora, first_match, answered_only=True)
    assert (both.n, both.first_only, both.second_only, out) == (2, 1, 1, 1)


def test_outputs_of_other_questions_are_refused():
    with pytest.raises(ValueError, match="not of the same questions"):
        compare([output(0, "option1", "")], [output(0, "option2", "")], first_match)


def test_kinds_leave_out_the_number_and_the_white_space():
    outputs = [output(0, "", "a:\n   option1"), output(1, "", "a: option2"), output(2, "", "")]
    assert kinds(outputs) == {"a: optionN": 2, "": 1}


def test_a_file_that_cannot_be_had_is_named_with_address_hash_and_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    path, sha256 = FILES["dora"]
    with pytest.raises(FileNotFoundError) as error:
        fetch_outputs("dora", "http://127.0.0.1:9/")
    for words in (path, "http://127.0.0.1:9/", sha256, str(tmp_path / "report-outputs" / "results")):
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match="dora-lab claims --fetch"):
        read_outputs("dora")


def test_another_file_in_its_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    place = outputs_folder() / FILES["lora"][0]
    place.parent.mkdir(parents=True)
    place.write_text("[]")
    with pytest.raises(ValueError, match="expected sha256 911857b7"):
        fetch_outputs("lora")


def test_a_method_without_outputs_is_refused():
    with pytest.raises(ValueError, match="lora and dora"):
        fetch_outputs("full")


def test_training_reads_the_question_as_evaluation_does_and_then_the_answer():
    asked, trained = evaluation_text(EXAMPLE), training_text(EXAMPLE)
    assert trained == asked + "the correct answer is option2"
    assert asked.endswith("### Response:\n" + 16 * " ") and asked.count(16 * " ") == 5


def test_an_answer_is_lost_with_its_last_token():
    assert answers_lost([255, 256, 257, 400]) == 0.5


def test_without_the_tokenizer_the_error_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tokenizer_path().parent)):
        load_tokenizer()


# --- the real files ---------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_first_match_is_what_the_report_recorded_on_every_output(report_cache):
    for method in FILES:
        outputs = read_outputs(method)
        assert len(outputs) == 1267
        assert [first_match(one.text) or "" for one in outputs] == [one.recorded for one in outputs]


@pytest.mark.real_data
def test_the_outputs_are_of_the_test_file_in_its_order(report_cache):
    examples = load_examples(str(llm_adapters_folder() / "dataset"), "winogrande", "test")
    expected = [(example.id, example.instruction, example.answer) for example in examples]
    for method in FILES:
        assert [(one.id, one.instruction, one.gold) for one in read_outputs(method)] == expected


@pytest.mark.real_data
def test_a_download_is_verified_and_kept(report_cache, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = partial(SimpleHTTPRequestHandler, directory=report_cache)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = fetch_outputs("lora", f"http://127.0.0.1:{server.server_address[1]}/")
        server.shutdown()
    assert path.is_relative_to(tmp_path) and len(json.loads(path.read_text())) == 1267
    assert fetch_outputs("lora", "http://127.0.0.1:9/") == local_outputs("lora") == path  # from now on without a server


@pytest.mark.real_data
def test_the_border_differs_between_training_and_evaluation(report_cache):
    tokenizer = load_tokenizer()
    found = border(tokenizer, EXAMPLE)
    assert found.training[-4:] == ("▁" * 15, "▁the", "▁correct", "▁answer") and found.evaluation[-1] == "▁" * 16
    assert found.training[:4] == found.evaluation[:4] and not found.same
    assert token_counts(tokenizer, [EXAMPLE])[0] == 1 + len(tokenizer.encode(training_text(EXAMPLE)))


@pytest.mark.real_data
@pytest.mark.slow
def test_the_chapter_tells_the_story_from_the_files(report_cache, tmp_path):
    run_chapter("12_auditing_the_report", tmp_path / "out.ipynb", cache_dir=str(report_cache.parent))
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    lora, dora = read_outputs("lora"), read_outputs("dora")
    unread = len(unread_ids(lora, first_match))
    assert "Not measured" not in text and f"{unread} without an answer" in text
    pairs, _ = compare(dora, lora, first_match, answered_only=True)
    assert f"first match, answered by both {100 * pairs.difference:+.1f}" in text and "no difference shown" in text
    assert "the same in 0 of 1,267 prompts" in text and "lose their answer at 256 tokens" in text
