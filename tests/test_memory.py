"""The memory plan: counts against built models, kept and peak bytes against measurements, and what it says."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from dora_lab import bench
from dora_lab.activations import kept_bytes, logit_bytes
from dora_lab.adapters import LLAMA_TARGETS, AdapterConfig, attach, trainable_parameters
from dora_lab.cli import app
from dora_lab.job import Job
from dora_lab.memory import (
    GPUS,
    PARTS,
    RESERVED_BYTES,
    answer,
    changes,
    longest,
    optimizer_bytes,
    plan,
    plan_job,
    weight_bytes,
)
from dora_lab.models import MINI_WORLD, checkpoint_layers, llama_config
from dora_lab.quantised import random_llama
from dora_lab.shapes import SHAPES, Shape, find_shape

LLAMA_7B = SHAPES["llama-7b"]
SMALL = Shape("small", 1000, 128, 352, 3, 4, 4, 32)
WIDE = Shape("wide", 1000, 256, 672, 2, 4, 2, 64)  # two query heads share a key head
OUT_OF_TEN = 0.1  # what the plan may be off by


def build(job, device="cpu"):
    """A random Llama of the job's shape, adapted as the job says, in training."""
    shape = job.shape
    quantisation = "nf4" if job.base_precision == "nf4" else "none"
    dtype = torch.float32 if job.base_precision == "float32" else torch.bfloat16
    model = random_llama(llama_config(shape), dtype, device, quantisation)
    model.config.use_cache = False
    low_rank = {} if job.method == "full" else {"rank": job.rank, "alpha": 2 * job.rank, "dropout": job.dropout}
    attach(model, AdapterConfig(job.method, target_modules=job.target_modules, **low_rank))
    model.enable_input_require_grads()
    if job.checkpointing:
        checkpoint_layers(model)
    return model.train()


def setting_of(job):
    """What `bench` measures with; its random tokens need a vocabulary of 1000."""
    return bench.Setting(job.batch, job.length, accumulation=job.accumulation)


def lasting_bytes(job):
    """The part of a plan that is there before a step."""
    return weight_bytes(job) + optimizer_bytes(job) + (0 if job.method == "full" else 4 * job.trained)


def norm_bytes(job):
    """What the norm caches of a DoRA model hold: ‖W0‖² and the norm."""
    return job.shape.layers * sum(8 * out for out, _ in job.targets.values()) if job.method == "dora" else 0


ALL_TARGETS = tuple(SMALL.linears)
JOBS = [
    Job(shape, method, rank, batch, length, dropout=dropout, checkpointing=checkpointing, device="cpu", **more)
    for shape, rank, batch, length, more in (
        (SMALL, 4, 8, 64, {"base_precision": "float32"}),
        (WIDE, 8, 2, 128, {"base_precision": "float32", "target_modules": ALL_TARGETS}),
        (SMALL, 8, 8, 128, {"base_precision": "float32", "accumulation": 2, "target_modules": ("q_proj", "v_proj")}),
        (WIDE, 4, 8, 64, {"base_precision": "bfloat16"}),
        (SMALL, 4, 8, 64, {"base_precision": "nf4"}),
    )
    for method in ("lora", "dora", "full")
    for dropout in (0.0, 0.05)
    for checkpointing in (False, True)
    if not (method == "full" and (dropout or more["base_precision"] == "nf4"))
]
NAMES = [
    f"{j.name}, {j.shape.name}, {j.dropout}, {len(j.target_modules)} targets, {j.accumulation} micro-batches"
    for j in JOBS
]


@pytest.mark.parametrize("job", [j for j in JOBS if not j.checkpointing], ids=[n for n in NAMES if "no check" in n])
def test_kept_bytes_are_what_autograd_keeps(job):
    measured = bench.saved_bytes(build(job), setting_of(job))
    assert kept_bytes(job) + logit_bytes(job)[0] == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("job", JOBS, ids=NAMES)
def test_the_peak_is_planned_within_a_tenth(job):
    step = bench.make_step(build(job), setting_of(job))
    step()  # the optimizer's states and the norm caches are there from now on
    planned = plan_job(job).total - lasting_bytes(job) - norm_bytes(job)
    assert planned == pytest.approx(bench.peak_bytes(step), rel=OUT_OF_TEN)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", bench.PRECISIONS)
def test_the_peak_of_peft_s_dora_is_planned_within_a_tenth(precision, checkpointing, dropout):
    setting = bench.Setting(8, 128, dropout, 1, checkpointing, hidden=256, layers=3, rank=8, precision=precision)
    model = bench.build("dora-peft", setting)
    step = bench.make_step(model, setting)
    step()
    job = Job(
        Shape.of(model.config), "dora-peft", 8, 8, 128, dropout=dropout, checkpointing=checkpointing,
        base_precision=precision, device="cpu",
    )  # fmt: skip
    assert plan_job(job).total - lasting_bytes(job) == pytest.approx(bench.peak_bytes(step), rel=OUT_OF_TEN)


# --- what is there all the time ---------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_published_models():
    found = {name: shape.parameters for name, shape in SHAPES.items()}
    assert found["llama-7b"] == 6_738_415_616 and found["llama-13b"] == 13_015_864_320
    assert found["llama3-8b"] == 8_030_261_248 and found["llama-3.2-1b"] == 1_235_814_400
    assert found["tinyllama-1.1b"] == 1_100_048_384
    assert Job(LLAMA_7B, "lora").trained == 56_098_816  # the paper's 0.83 %
    share = 100 * Job(LLAMA_7B, "dora", 16).trained / (LLAMA_7B.parameters + Job(LLAMA_7B, "dora", 16).trained)
    assert round(share, 2) == 0.43


def test_a_shape_is_read_from_a_configuration_and_from_a_folder():
    values = json.loads((MINI_WORLD / "config.json").read_text())
    assert Shape.of(values, "mini-world") == SHAPES["mini-world"] == find_shape("mini-world")
    assert replace(find_shape(str(MINI_WORLD)), name="mini-world") == SHAPES["mini-world"]
    assert Shape.of(LlamaConfig(vocab_size=32000), "llama-7b") == find_shape("random:llama-7b")


@pytest.mark.parametrize("job", JOBS[::5], ids=NAMES[::5])
def test_counts_are_those_of_the_built_model(job):
    trained, total = trainable_parameters(build(replace(job, base_precision="float32")))
    assert job.trained == trained
    assert total == job.shape.parameters + (0 if job.method == "full" else job.trained)


@pytest.mark.parametrize("precision, double", [("nf4", False), ("nf4-double", True), ("int8", None)])
def test_quantised_weights_take_the_planned_bytes(precision, double):
    import bitsandbytes as bnb

    shape = Shape("one", 1000, 256, 512, 1, 4, 4, 64)
    total = (shape.outer_parameters + 2 * shape.hidden) * 2
    for out, inp in shape.linears.values():
        weight = torch.randn(out, inp, dtype=torch.float16)
        if double is None:
            layer = bnb.nn.Linear8bitLt(inp, out, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
            layer(torch.randn(1, inp, dtype=torch.float16))
            scale = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
            total += layer.weight.numel() * layer.weight.element_size() + scale.numel() * scale.element_size()
        else:
            held = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double).to(
                "cpu"
            )
            state = held.quant_state
            parts = [held, state.absmax, *([state.state2.absmax] if double else [])]
            total += sum(part.numel() * part.element_size() for part in parts)
    assert weight_bytes(Job(shape, base_precision=precision)) == pytest.approx(total, rel=0.001)


def test_optimizer_bytes_are_those_of_adamw():
    job = Job(SMALL, rank=4, base_precision="float32")
    model = build(job)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values() if s.numel() > 1]
    assert optimizer_bytes(job) == sum(state.numel() * state.element_size() for state in states)
    assert optimizer_bytes(replace(job, optimizer="adamw-8bit")) < optimizer_bytes(job) / 3.9
    assert optimizer_bytes(replace(job, optimizer="paged-adamw")) == 0


# --- what the plan says -----------------------------------------------------------------------------------------------


def test_the_parts_add_up_and_the_targets_of_the_project_are_met():
    dora, qdora = plan(LLAMA_7B), plan(LLAMA_7B, base_precision="nf4")
    assert dora.total == sum(getattr(dora, part) for part in PARTS)
    assert dora.total <= 24e9 and qdora.total <= 12e9
    assert dora.fits == {16: False, 24: True, 40: True, 80: True} and qdora.fits[16]
    assert set(dora.fits) == set(GPUS)


def test_the_report_s_way_does_not_fit_on_40_gb_at_its_cut_off():
    reported = {"checkpointing": False, "base_precision": "float16"}
    lora = plan(LLAMA_7B, method="lora", length=256, **reported)
    assert not lora.fits[40] and max(PARTS, key=lambda part: getattr(lora, part)) == "activations"
    said = answer(lora, 40)
    assert "40 GB are not enough, whatever the number of examples" in said
    assert "with gradient checkpointing" in said and "which fits" in said
    assert changes(lora)[0][1].fits[24]
    assert 100 < longest(LLAMA_7B, 40, method="lora", **reported) < 256 < longest(LLAMA_7B, 40)


def test_the_longest_sequence_is_the_last_that_fits():
    length = longest(LLAMA_7B, 24, base_precision="nf4")
    for tokens, fits in ((length, True), (length + 1, False)):
        assert (plan(LLAMA_7B, length=tokens, base_precision="nf4").total + RESERVED_BYTES <= 24e9) == fits
    assert longest(LLAMA_7B, 1) == 0


def test_every_change_saves_and_is_a_single_one():
    before = plan(LLAMA_7B, method="dora-peft", checkpointing=False)
    found = changes(before)
    totals = [changed.total for _, changed in found]
    assert totals == sorted(totals) and totals[-1] < before.total
    assert {name for name, _ in found} >= {"gradient checkpointing", "base in NF4", "this project's DoRA layer"}
    assert changes(plan(LLAMA_7B, method="full", batch=1, optimizer="paged-adamw", logit_columns=4)) == []


@pytest.mark.parametrize(
    "choices, said",
    [
        ({"method": "qdora"}, "unknown method 'qdora': choose one of full, lora"),
        ({"base_precision": "int4"}, "unknown base_precision 'int4'"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"rank": 0}, "rank must be a whole number above 0, got 0"),
        ({"rank": 5000}, "rank 5000 is too large for q_proj"),
        ({"batch": True}, "batch must be a whole number above 0, got True"),
        ({"length": 1.5}, "length must be a whole number above 0, got 1.5"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"target_modules": "q_proj"}, "target_modules must be a list"),
        ({"target_modules": ("query",)}, "target module 'query' is not in a Llama"),
        ({"logit_columns": 513}, "logit_columns is 513, a sequence has 512"),
        ({"method": "full", "base_precision": "nf4"}, "cannot be trained in full"),
    ],
)
def test_what_makes_no_run_is_refused(choices, said):
    with pytest.raises(ValueError, match=said):
        plan(LLAMA_7B, **choices)


def test_what_makes_no_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="hidden must be a whole number above 0"):
        Shape("bad", 1, 0, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="3 heads do not share 2"):
        Shape("bad", 1, 1, 1, 1, 3, 2, 1)
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        Shape.of({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="has no 'hidden_size'"):
        Shape.of({"model_type": "llama"})
    with pytest.raises(ValueError, match=r"a configuration is a mapping, got \[\]"):
        Shape.of([])
    with pytest.raises(ValueError, match="unknown model 'llama-8b'"):
        find_shape("llama-8b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        find_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], r"a configuration is a mapping, got \[\]"),
        ({"num_attention_heads": 0}, "heads must be a whole number above 0, got 0"),
        ({"num_attention_heads": "4"}, "heads must be a whole number above 0, got '4'"),
        ({"hidden_size": None}, "hidden must be a whole number above 0, got None"),
        ({"num_key_value_heads": "2"}, "kv_heads must be a whole number above 0, got '2'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ],
)
def test_a_configuration_that_makes_no_shape_is_named(tmp_path, config, message):
    values = json.loads((MINI_WORLD / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values | config if isinstance(config, dict) else config))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        find_shape(str(tmp_path))


def test_the_command_prints_the_parts_where_it_fits_and_what_saves():
    said = CliRunner().invoke(app, ["plan", "--no-checkpointing", "--length", "256", "--target", "q_proj"])
    assert said.exit_code == 0, said.output
    for words in ("llama-7b: DoRA r=32, bfloat16, 16 × 256, no checkpointing", "activations", "fits on: 16 GB no"):
        assert words in said.output
    assert "gradient checkpointing" in said.output and "number of examples" in said.output
    refused = CliRunner().invoke(app, ["plan", "--base-precision", "int3"])
    assert refused.exit_code == 2 and "error: unknown base_precision 'int3'" in refused.output


# --- CUDA -------------------------------------------------------------------------------------------------------------


def measured_on_cuda(job):
    """Most bytes that tensors take in a step, model and all, after one step that is not measured."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = build(job, "cuda")
    step = bench.make_step(model, setting_of(job))
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_peak_of_llama_7b_s_layers_on_cuda(method, precision, checkpointing):
    layers = replace(LLAMA_7B, layers=3)
    job = Job(layers, method, 32, 8, 512, base_precision=precision, checkpointing=checkpointing)
    assert plan_job(job).total == pytest.approx(measured_on_cuda(job), rel=OUT_OF_TEN)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision, most", [("bfloat16", 24e9), ("nf4", 12e9)])
def test_random_llama_7b_trains_under_a_cap_of_40_gb(precision, most):
    whole = torch.cuda.get_device_properties(0).total_memory
    if whole < 39e9:
        pytest.skip(f"needs 40 GB of GPU memory, has {whole / 1e9:.0f}")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 40e9 / whole))
    try:
        job = Job(LLAMA_7B, "dora", 32, 16, 512, target_modules=LLAMA_TARGETS, base_precision=precision)
        measured = measured_on_cuda(job)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert measured <= most
    assert plan_job(job).total == pytest.approx(measured, rel=OUT_OF_TEN)
