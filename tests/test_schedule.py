"""How long runs take: tokens and operations against counts by hand and by PyTorch, and hours from a measurement."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dora_lab.adapters import AdapterConfig, attach
from dora_lab.job import Job
from dora_lab.models import checkpoint_layers, llama_config, load_tokenizer
from dora_lab.profiles import load_profile
from dora_lab.quantised import random_llama
from dora_lab.schedule import (
    RECORDED_TOKENS,
    hours,
    measured_tokens,
    needed_share,
    needed_tokens_per_s,
    operations_per_token,
    planned_runs,
    read_measurements,
)
from dora_lab.shapes import SHAPES, Shape


@pytest.fixture
def runs(monkeypatch, tmp_path):
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path / "empty"))
    return planned_runs(load_profile("llama-7b"))


def measurement(**speeds) -> dict:
    """What `measure-7b` writes, with made-up tokens a second; 0 stands for a variant that ran out of memory."""
    rows = [
        {"variant": name, "tokens_per_s": speed} if speed else {"variant": name, "error": "out of memory"}
        for name, speed in speeds.items()
    ]
    return {"environment": {"device": "made up"}, "workload": {"model": "llama-7b"}, "rows": rows}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length", [32, 256])
def test_operations_are_those_that_pytorch_counts(checkpointing, length):
    shape = Shape("small", 1000, 128, 352, 3, 4, 4, 32)
    job = Job(shape, "lora", 8, 2, length, checkpointing=checkpointing, dropout=0.0)
    model = random_llama(llama_config(shape), torch.float32, "cpu").requires_grad_(False)
    model.set_attn_implementation("eager")  # of which PyTorch counts the products
    attach(model, AdapterConfig("lora", 8, 16)).train()
    if checkpointing:
        checkpoint_layers(model)
    ids = torch.randint(0, 1000, (2, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    hidden_by_the_mask = 4 * shape.layers * (length - 1) / 2 * 128 * (4 if checkpointing else 3)  # eager makes them
    mine = (operations_per_token(job) + hidden_by_the_mask) * 2 * length
    assert mine == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_six_runs_with_their_steps_and_tokens(runs):
    assert [(run.task, run.method) for run in runs] == [
        (task, method) for task in ("boolq", "hellaswag", "winogrande") for method in ("lora", "dora")
    ]
    for run in runs:
        assert run.tokens == round(run.steps * 16 * RECORDED_TOKENS[run.task]) and run.lengths == "recorded"
        assert run.operations / run.tokens == pytest.approx(6 * SHAPES["llama-7b"].parameters, rel=0.1)
    total = sum(run.tokens for run in runs)
    assert needed_tokens_per_s(runs, 12) == pytest.approx(total / 43200)
    assert needed_share(runs, 12, peak=312e12) == pytest.approx(sum(r.operations for r in runs) / 43200 / 312e12)
    assert needed_share(runs, 6) == pytest.approx(2 * needed_share(runs, 12))


@pytest.mark.slow
@pytest.mark.real_data
def test_lengths_are_of_the_cache_where_it_has_them(real_data, tmp_path, monkeypatch):
    import dataclasses

    dataset = tmp_path / "llm-adapters" / "dataset"
    dataset.mkdir(parents=True)
    (dataset / "boolq").symlink_to(real_data / "llm_adapters" / "boolq")
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    profile = dataclasses.replace(load_profile("llama-7b"), tokenizer=str(real_data / "llama_tokenizer"))
    found = planned_runs(profile)
    assert [run.lengths for run in found] == 2 * ["this cache"] + 4 * ["recorded"]
    assert found[0].tokens == pytest.approx(found[0].steps * 16 * RECORDED_TOKENS["boolq"], rel=0.01)
    (tmp_path / "hellaswag").mkdir()
    rebuilt = real_data / "llm_adapters" / "hellaswag" / "validation_reconstructed.json"
    (tmp_path / "hellaswag" / "test.json").symlink_to(rebuilt)
    tokenizer = load_tokenizer(profile.base_model, profile.revision, profile.tokenizer)
    for name, source in (("winogrande", real_data / "llm_adapters"), ("hellaswag", tmp_path)):
        measured = measured_tokens(profile, name, tokenizer, str(source), "test")
        assert measured == pytest.approx(RECORDED_TOKENS[name], rel=0.01)


def test_a_task_without_lengths_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="no lengths of commonsense_170k are recorded: fetch it with `dora-lab fetch"):
        planned_runs(load_profile("llama-7b-paper"))


def test_hours_follow_from_a_measurement(runs, tmp_path):
    (tmp_path / "a100.json").write_text(json.dumps(measurement(lora=4000.0, dora=2000.0, qdora=0)))
    (measured,) = read_measurements(tmp_path)
    assert measured["file"] == "a100.json"
    found = hours(runs, measured)
    assert found[0] == pytest.approx(runs[0].tokens / 4000 / 3600) and found[1] == pytest.approx(2 * found[0])
    assert hours(runs, measurement(lora=4000.0, dora=0))[1::2] == [None, None, None]
    assert read_measurements(tmp_path / "none") == []


@pytest.mark.parametrize(("text", "message"), [("{", "broken JSON"), ('{"rows": []}', "is no measurement of")])
def test_a_file_that_is_no_measurement_is_named(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x.json .*{message}.*: delete it, or measure again with"):
        read_measurements(tmp_path)
