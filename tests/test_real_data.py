"""Real BoolQ, WinoGrande and HellaSwag, and LLaMA's tokenizer, through the whole path on a small random Llama."""

import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dora_lab.data import IGNORED, load_examples, tokenized
from dora_lab.evaluation import generate, likelihood
from dora_lab.files import read_lines
from dora_lab.models import load_base
from dora_lab.profiles import load_profile
from dora_lab.records import read_predictions, run_folder
from dora_lab.specs import RunSpec
from dora_lab.training import finetune

pytestmark = pytest.mark.real_data
TASKS = ("boolq", "winogrande", "hellaswag")
ANSWER = ["▁correct", "▁answer", "▁is"]


@pytest.fixture(scope="module")
def profile(tmp_path_factory, real_data, tiny_profile):
    """A profile on the real files. Of WinoGrande and HellaSwag there is one file: a part of it serves as train."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(real_data / "llm_adapters" / "boolq", folder / "data" / "boolq")
    for task, name, first in (("winogrande", "test", 600), ("hellaswag", "validation_reconstructed", 9000)):
        records = json.loads((real_data / "llm_adapters" / task / f"{name}.json").read_text())
        (folder / "data" / task).mkdir()
        for split, part in (("test", records[:first]), ("train", records[first:])):
            (folder / "data" / task / f"{split}.json").write_text(json.dumps(part))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    shutil.copy(real_data / "llama_tokenizer" / "tokenizer.model", folder / "base")
    values = yaml.safe_load(tiny_profile.read_text()) | {
        "name": "real",
        "base_model": "./base",
        "data": "data",
        "tasks": list(TASKS),
        "steps": dict.fromkeys(TASKS, 20),
        "prompt": "alpaca",
        "append_eos": True,
        "cutoff_tokens": 512,
        "rank": 8,
        "test_examples": 50,
        "validation_examples": 100,
    }
    (folder / "real.yaml").write_text(yaml.safe_dump(values))
    return load_profile(folder / "real.yaml")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_twenty_steps_and_fifty_questions(profile, tmp_path, task, method):
    spec = RunSpec.from_profile(profile, task, method)
    record = finetune(spec, tmp_path, progress=False)
    folder = run_folder(tmp_path, spec)
    predictions, curve = read_predictions(folder), read_lines(folder / "curve.jsonl")
    assert record.result.n == len(predictions) == 50 and record.result.shortened_prompts == 0
    assert [p["id"] for p in predictions] == [f"{task}-test-{i}" for i in range(50)]
    assert curve[-1]["step"] == 20 and curve[-1]["loss"] < curve[0]["loss"]
    assert len(read_lines(folder / "geometry.jsonl")) == 4 * 2 * 2


@pytest.mark.parametrize("task", TASKS)
def test_twenty_steps_and_what_the_model_writes(profile, tmp_path, task):
    spec = replace(RunSpec.from_profile(profile, task, "dora"), evaluation="generate", test_examples=6)
    record = finetune(spec, tmp_path, progress=False)
    predictions = read_predictions(run_folder(tmp_path, spec))
    assert spec.run_id != RunSpec.from_profile(profile, task, "dora").run_id
    assert record.result.n == len(predictions) == 6 and record.result.accuracy_per_token is None
    assert all(isinstance(p["text"], str) and p["log_likelihoods"] == {} for p in predictions)
    assert record.result.unparsed_rate == sum(not p["parsed"] for p in predictions) / 6
    assert all(p["prediction"] == "" for p in predictions if not p["parsed"])


def test_every_real_record_is_read_and_validation_is_held_back(profile):
    sizes = {
        (task, split): len(load_examples(profile.data, task, split, validation_examples=100))
        for task in TASKS
        for split in ("train", "validation", "test")
    }
    assert sizes["boolq", "train"] == 9327 and sizes["boolq", "test"] == 3270  # 9,427 less 100 held back
    assert sizes["winogrande", "train"] + 100 + sizes["winogrande", "test"] == 1267
    assert sizes["hellaswag", "train"] + 100 + sizes["hellaswag", "test"] == 10042
    assert {sizes[task, "validation"] for task in TASKS} == {100}


@pytest.mark.parametrize("task", TASKS)
def test_llamas_tokenizer_splits_prompt_and_answer_in_the_same_place_every_time(profile, task):
    model, tokenizer = load_base(profile.base_model)
    examples = load_examples(profile.data, task, "test", limit=200)
    rows, shortened = tokenized(tokenizer, examples, "alpaca", append_eos=True, cutoff_tokens=512)
    assert shortened == 0
    for row, example in zip(rows, examples, strict=True):
        assert row["input_ids"][0] == tokenizer.bos_token_id
        answer = [token for token in row["labels"] if token != IGNORED]
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == f"the correct answer is {example.answer}"


@pytest.mark.parametrize("task", TASKS)
def test_training_and_both_protocols_read_the_same_tokens_up_to_the_answer(profile, monkeypatch, task):
    model, tokenizer = load_base(profile.base_model)
    examples = load_examples(profile.data, task, "test", limit=30)
    rows, _ = tokenized(tokenizer, examples, "alpaca", append_eos=True, cutoff_tokens=512)
    scored, prompts = [], []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: scored.append(kw["input_ids"][0].tolist()) or forward(**kw))
    likelihood(model, tokenizer, examples, "alpaca", 1)
    monkeypatch.setattr(model, "generate", lambda input_ids, **kw: prompts.append(input_ids[0].tolist()) or input_ids)
    generate(model, tokenizer, examples, "alpaca", 1)
    trained = [
        (
            row["input_ids"][:-2],
            [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED],
        )
        for row in rows
    ]  # all but what tells the candidates apart and the end token; the prompt alone
    prefix, *scored = scored
    scored = [prefix + ids for ids in scored]
    assert len(prefix) > 35 and sorted(scored) == sorted(whole for whole, _ in trained)
    assert sorted(prompts) == sorted(prompt for _, prompt in trained)
    for ids in scored:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        assert ANSWER in (pieces[-3:], pieces[-4:-1])  # in front of ▁true, or of the 2 in ▁ending 2


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_likelihoods_equal_one_candidate_at_a_time(profile, task):
    model, tokenizer = load_base(profile.base_model)
    examples = load_examples(profile.data, task, "test", limit=8)
    for p, example in zip(likelihood(model, tokenizer, examples, "alpaca", 3), examples, strict=True):
        for candidate in example.candidates:
            (row,), _ = tokenized(tokenizer, [replace(example, answer=candidate)], "alpaca", False, 512)
            ids = torch.tensor([row["input_ids"]])  # (1, tokens)
            own = len(tokenizer.tokenize(candidate))  # the same tokens as behind "is "
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)  # (tokens, vocabulary)
            expected = sum(log_p[i - 1, ids[0, i]].item() for i in range(ids.shape[1] - own, ids.shape[1]))
            assert p.log_likelihoods[candidate] == pytest.approx(expected, abs=1e-4)
            if own > 1:
                assert p.log_likelihoods_per_token[candidate] == pytest.approx(expected / own, abs=1e-4)


@pytest.mark.slow
def test_scoring_is_twenty_times_as_fast_as_the_papers_way(profile):
    """Questions a second, one thread, against generation one question at a time, as the paper's scripts run it."""
    model, tokenizer = load_base(profile.base_model)
    examples = load_examples(profile.data, "winogrande", "test", limit=256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for protocol, batch_size, asked in ((likelihood, 16, examples), (generate, 1, examples[::16])):
            protocol(model, tokenizer, asked[:2], "alpaca", batch_size)
            began = time.perf_counter()
            protocol(model, tokenizer, asked, "alpaca", batch_size)
            times.append((time.perf_counter() - began) / len(asked))
    finally:
        torch.set_num_threads(threads)
    assert times[1] / times[0] >= 20


def test_the_real_files_serve_from_a_cache(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    folder = tmp_path / "llm-adapters" / "dataset"
    folder.mkdir(parents=True)
    for task in ("boolq", "winogrande"):
        (folder / task).symlink_to(real_data / "llm_adapters" / task)
    assert len(load_examples("llm-adapters", "boolq", "train")) == 9427 - 300
    assert len(load_examples("llm-adapters", "boolq", "test")) == 3270
    assert len(load_examples("llm-adapters", "winogrande", "test")) == 1267


def test_real_data_has_an_identity_of_its_own(profile, tiny_spec):
    spec = RunSpec.from_profile(profile, "boolq", "dora")
    assert spec.run_id != replace(spec, data_sha256=tiny_spec().data_sha256).run_id
