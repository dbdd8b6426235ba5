"""The real BoolQ and WinoGrande files and the real LLaMA tokenizer through the whole path, on a small random Llama."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dora_lab.data import IGNORED, load_examples, tokenized
from dora_lab.models import load_base
from dora_lab.profiles import load_profile
from dora_lab.records import RunSpec, read_lines, read_predictions, run_folder
from dora_lab.training import finetune

pytestmark = pytest.mark.real_data
TASKS = ("boolq", "winogrande")


@pytest.fixture(scope="module")
def profile(tmp_path_factory, real_data, tiny_profile):
    """A profile on the real files. Of WinoGrande only the test file is there: its second half serves as train."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(real_data / "llm_adapters" / "boolq", folder / "data" / "boolq")
    records = json.loads((real_data / "llm_adapters" / "winogrande" / "test.json").read_text())
    (folder / "data" / "winogrande").mkdir()
    for split, part in (("test", records[:600]), ("train", records[600:])):
        (folder / "data" / "winogrande" / f"{split}.json").write_text(json.dumps(part))
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
        "cutoff_tokens": 256,
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


def test_every_real_record_is_read_and_validation_is_held_back(profile):
    sizes = {
        (task, split): len(load_examples(profile.data, task, split, validation_examples=100))
        for task in TASKS
        for split in ("train", "validation", "test")
    }
    assert sizes["boolq", "train"] == 9327 and sizes["boolq", "test"] == 3270  # 9,427 less 100 held back
    assert sizes["winogrande", "train"] + 100 + sizes["winogrande", "test"] == 1267
    assert sizes["boolq", "validation"] == sizes["winogrande", "validation"] == 100


@pytest.mark.parametrize("task", TASKS)
def test_llamas_tokenizer_splits_prompt_and_answer_in_the_same_place_every_time(profile, task):
    model, tokenizer = load_base(profile.base_model)
    examples = load_examples(profile.data, task, "test", limit=200)
    rows, shortened = tokenized(tokenizer, examples, "alpaca", append_eos=True, cutoff_tokens=256)
    assert shortened == 0
    for row, example in zip(rows, examples, strict=True):
        assert row["input_ids"][0] == tokenizer.bos_token_id
        answer = [token for token in row["labels"] if token != IGNORED]
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == f"the correct answer is {example.answer}"


def test_real_data_has_an_identity_of_its_own(profile, tiny_spec):
    spec = RunSpec.from_profile(profile, "boolq", "dora")
    assert spec.run_id != replace(spec, data_sha256=tiny_spec().data_sha256).run_id
