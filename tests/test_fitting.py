"""What lets a large run fit and survive: recomputed layers, quantised bases, optimizers, batches, cut-offs, guards."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dora_lab import guards, trainer, training
from dora_lab.data import IGNORED, load_examples, tokenized
from dora_lab.files import read_lines
from dora_lab.models import load_model, load_tokenizer
from dora_lab.preflight import plan_of
from dora_lab.profiles import load_profile
from dora_lab.quantised import bitsandbytes_config
from dora_lab.records import LIVE_CURVE, is_done, read_failures, read_predictions, run_folder
from dora_lab.specs import RunSpec
from dora_lab.training import finetune, largest_micro_batch


def adapter_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance)


# --- gradient checkpointing and precision ---


def test_with_gradient_checkpointing_every_layer_runs_twice_and_the_adapter_is_the_same(
    tiny_spec, tmp_path, monkeypatch
):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, adapters = [], []
    forward = LlamaMLP.forward

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled() and self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    for checkpointing in (False, True):
        spec = tiny_spec(gradient_checkpointing=checkpointing, dropout=0.0, steps=3)
        calls.clear()
        finetune(spec, tmp_path, progress=False)
        assert sum(calls) == 3 * 2 * (1 + checkpointing)  # steps, layers, and once more in the backward
        adapters.append(adapter_of(run_folder(tmp_path, spec)))
    close(*adapters, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_16_bits_is_trained_with_adapters_of_32(tiny_spec, tmp_path, dtype):
    spec = tiny_spec(dtype=dtype)
    finetune(spec, tmp_path, progress=False)
    assert {value.dtype for value in adapter_of(run_folder(tmp_path, spec)).values()} == {torch.float32}
    curve = read_lines(run_folder(tmp_path, spec) / "curve.jsonl")
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize("quantisation", ["int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("method", ["lora", "dora", "dora-magnitude"])
def test_a_quantised_base_is_trained_and_answers(tiny_spec, tmp_path, quantisation, method):
    spec = tiny_spec(method=method, quantisation=quantisation, dtype="bfloat16", steps=8)
    record = finetune(spec, tmp_path, progress=False)
    assert record.result.n == 24
    curve = read_lines(run_folder(tmp_path, spec) / "curve.jsonl")
    assert curve[-1]["loss"] < curve[0]["loss"]
    rows = read_lines(run_folder(tmp_path, spec) / "geometry.jsonl")
    assert all(row["delta_magnitude"] > 0 for row in rows)


def test_a_quantised_base_cannot_be_trained_in_full(tiny_profile):
    profile = replace(load_profile(tiny_profile), quantisation="nf4")
    with pytest.raises(ValueError, match="a base in nf4 cannot be trained in full: choose lora, dora"):
        RunSpec.from_profile(profile, "boolq", "full")


def test_an_unknown_quantisation_is_named():
    with pytest.raises(ValueError, match="unknown quantisation 'int3': choose one of int8, nf4, nf4-double"):
        bitsandbytes_config("int3", torch.bfloat16)


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw"])
def test_the_optimizers_of_bitsandbytes(tiny_spec, tmp_path, optimizer):
    spec = tiny_spec(optimizer=optimizer, geometry=False)
    try:
        finetune(spec, tmp_path, progress=False)
    except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
        if torch.cuda.is_available():
            raise
        pytest.skip(f"bitsandbytes has no such optimizer without CUDA here: {error}")
    curve = read_lines(run_folder(tmp_path, spec) / "curve.jsonl")
    assert curve[-1]["loss"] < curve[0]["loss"]


# --- random weights ---


def test_random_weights_of_a_shape_are_made_in_the_dtype_and_every_time_the_same():
    one, other = (load_model("random:mini-world", "bfloat16") for _ in range(2))
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_random_weights_need_a_tokenizer_from_elsewhere(tiny_spec, tmp_path):
    with pytest.raises(ValueError, match="base model random:mini-world has no tokenizer: set tokenizer to a folder"):
        finetune(tiny_spec(base_model="random:mini-world"), tmp_path, progress=False)
    spec = tiny_spec(base_model="random:mini-world", tokenizer="mini-world", steps=2, cutoff_tokens=128)
    assert finetune(spec, tmp_path, progress=False).result.total_parameters > 2_000_000


def test_random_weights_of_an_unknown_shape_are_refused(tiny_spec, tmp_path):
    spec = tiny_spec(base_model="random:llama-8b", tokenizer="mini-world")
    with pytest.raises(ValueError, match="unknown model 'random:llama-8b': choose one of .*llama-7b"):
        finetune(spec, tmp_path, progress=False)


# --- batches and cut-offs ---


def test_length_grouped_batches_read_the_same_examples_with_less_padding(tiny_spec):
    lengths = torch.randint(10, 200, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    found = {}
    for grouped in (False, True):
        order = trainer.order(lengths, tiny_spec(steps=125, batch_size=4, length_grouped=grouped))
        batches = [[lengths[i] for i in order[first : first + 4]] for first in range(0, 500, 4)]
        found[grouped] = sum(max(batch) * 4 - sum(batch) for batch in batches)
        assert sorted(order) == list(range(500))
    assert found[True] < found[False] / 10


def test_a_run_on_length_grouped_batches(tiny_spec, tmp_path):
    spec = tiny_spec(length_grouped=True)
    assert spec.run_id != tiny_spec().run_id
    finetune(spec, tmp_path, progress=False)


def test_the_cut_off_set_from_the_data_cuts_nothing(tiny_spec, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        record = finetune(tiny_spec(cutoff_tokens="auto", steps=2), tmp_path, progress=False)
    assert record.result.shortened_prompts == 0


def test_what_is_cut_is_counted_in_a_warning(tiny_spec, tmp_path):
    with pytest.warns(UserWarning, match=r"40 of 40 training examples lose the beginning of their prompt to 16 tokens"):
        record = finetune(tiny_spec(cutoff_tokens=16, steps=2), tmp_path, progress=False)
    assert record.result.shortened_prompts == 40
    spec = tiny_spec(cutoff_tokens=16, steps=2, cut="end", train_on_prompt=True)
    with pytest.warns(UserWarning, match="lose their end, the answer with it to 16 tokens"):
        finetune(spec, tmp_path, progress=False)


def test_the_prompt_is_masked_unless_it_is_trained_on(tiny_base, tiny_data):
    tokenizer = load_tokenizer(str(tiny_base))
    examples = load_examples(str(tiny_data), "boolq", "train")
    masked, _ = tokenized(tokenizer, examples, "alpaca-short", False, None)
    whole, _ = tokenized(tokenizer, examples, "alpaca-short", False, None, train_on_prompt=True)
    cut, count = tokenized(tokenizer, examples, "alpaca-short", False, 12, train_on_prompt=True, cut="end")
    assert count == len(examples)
    for with_mask, without, short in zip(masked, whole, cut, strict=True):
        assert with_mask["input_ids"] == without["input_ids"] == without["labels"]
        assert IGNORED in with_mask["labels"] and with_mask["labels"][-1] == without["labels"][-1]
        assert short["input_ids"] == short["labels"] == without["input_ids"][:12]


def test_training_on_the_prompt_counts_every_token_but_the_first(tiny_spec, tmp_path):
    spec = tiny_spec(train_on_prompt=True, dropout=0.0, steps=1)
    model, tokenizer = load_model(spec.base_model), load_tokenizer(spec.base_model)
    examples = load_examples(spec.data, spec.task, "train", None, spec.validation_examples)
    rows, _ = tokenized(tokenizer, examples, spec.prompt, False, 64, train_on_prompt=True)
    batch = trainer.collate([rows[i] for i in trainer.order([1] * len(rows), spec)])
    finetune(spec, tmp_path, progress=False)
    (row,) = read_lines(run_folder(tmp_path, spec) / "curve.jsonl")
    expected = model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).loss.item()
    assert row["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_profile_that_cuts_answers_must_train_on_prompts(tiny_profile, tmp_path):
    for change, message in (
        ("cut: end", "cut 'end' can leave an example without its answer: it needs train_on_prompt true"),
        ("micro_batch_size: 3", "micro_batch_size 3 does not divide the 4 examples of a step: take a divisor"),
        ("optimizer: sgd", "optimizer: .*got 'sgd'"),
        ("quantisation: nf3", "quantisation: .*got 'nf3'"),
        ("cutoff_tokens: longest", "cutoff_tokens.*got 'longest'"),
    ):
        path = tmp_path / "changed.yaml"
        key = change.split(":")[0]
        kept = [line for line in tiny_profile.read_text().splitlines() if not line.startswith(f"{key}:")]
        path.write_text("\n".join([*kept, change]) + "\n")
        with pytest.raises(ValueError, match=message):
            load_profile(path)


# --- a GPU that is too small ---


def test_micro_batches_give_the_same_adapter_as_whole_ones(tiny_spec, tmp_path):
    whole, parts = (tiny_spec(dropout=0.0, micro_batch_size=micro) for micro in (None, 2))
    for spec in (whole, parts):
        finetune(spec, tmp_path, progress=False)
    close(*(adapter_of(run_folder(tmp_path, spec)) for spec in (whole, parts)), rtol=1e-3, atol=1e-4)


def fail_above(monkeypatch, limit: int, from_step: int = 0):
    """Let the GPU be too small for more than `limit` examples at a time."""
    compute = trainer.RunTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > limit and self.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.RunTrainer, "compute_loss", limited)


@pytest.mark.parametrize("from_step", [0, 7])
def test_out_of_memory_goes_on_with_smaller_micro_batches(tiny_spec, tmp_path, monkeypatch, from_step):
    spec = tiny_spec(dropout=0.0)
    finetune(spec, tmp_path / "whole", progress=False)
    fail_above(monkeypatch, 1, from_step)
    with pytest.warns(UserWarning, match="; going on with") as told:
        record = finetune(spec, tmp_path / "small", progress=False)
    assert "micro-batches of 4; going on with 2 at a time, the same 4 a step. What would" in str(told[0].message)
    assert "micro-batches of 2; going on with 1 at a time, the same 4 a step. What would" in str(told[1].message)
    assert record.result.micro_batch_size == 1 and record.result.resumed == (from_step > 0)
    close(*(adapter_of(run_folder(tmp_path / name, spec)) for name in ("whole", "small")), rtol=1e-3, atol=1e-4)


def test_out_of_memory_with_the_smallest_micro_batch_says_what_the_planner_would_change(
    tiny_spec, tmp_path, monkeypatch
):
    fail_above(monkeypatch, 0)
    with (
        pytest.warns(UserWarning),
        pytest.raises(RuntimeError, match=r"micro-batches of 1 \(CUDA out of memory.*\): what would.*gradient checkp"),
    ):
        finetune(tiny_spec(), tmp_path, progress=False)
    (failure,) = read_failures(tmp_path / "tiny")
    assert "out of GPU memory" in failure["error"]


def test_out_of_memory_among_the_questions_says_so(tiny_spec, tmp_path, monkeypatch):
    def answer(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(training.PROTOCOLS, "likelihood", answer)
    with pytest.raises(RuntimeError, match="with 8 questions at a time: set evaluation_batch_size lower"):
        finetune(tiny_spec(), tmp_path, progress=False)


@pytest.mark.parametrize(("shares", "micro"), [(1, 1), (2, 2), (4, 4), (3, 4)], ids=str)
def test_a_run_that_lacked_memory_goes_on_with_as_many_for_each_process(
    tiny_spec, tmp_path, monkeypatch, shares, micro
):
    """On however many there are then; on a number that cannot share, with the profile's size, which says so."""
    spec, asked = tiny_spec(), []
    (tmp_path / training.NOTE).write_text("1\n")
    monkeypatch.setattr(training.processes, "count", lambda: shares)
    monkeypatch.setattr(training.processes, "told_by_first", lambda said: said())
    monkeypatch.setattr(training, "_train_with", lambda *arguments: asked.append(arguments[5]))
    training._train(spec, [], [12], tmp_path, False, None)
    assert spec.batch_size == 4 and asked == [micro]


def test_micro_batches_shrink_to_divisors():
    assert [largest_micro_batch(12, micro // 2) for micro in (12, 6, 4, 3, 2, 1)] == [6, 3, 2, 1, 1, None]


# --- what goes through the output layer ---


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_the_planner_counts_at_least_the_positions_whose_logits_a_run_makes(
    tiny_spec, tmp_path, monkeypatch, train_on_prompt
):
    """With the prompt masked they are the answers' tokens, however long the prompts beside them are."""
    spec, made = tiny_spec(train_on_prompt=train_on_prompt, steps=6, test_examples=1), []
    compute = trainer.RunTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        head = self.model.get_output_embeddings()
        hook = head.register_forward_hook(
            lambda layer, read, logits: made.append((len(logits), inputs["input_ids"].shape, inputs["labels"]))
        )
        loss = compute(self, model, inputs, *args, **kwargs)
        hook.remove()
        return loss

    monkeypatch.setattr(trainer.RunTrainer, "compute_loss", watched)
    finetune(spec, tmp_path, progress=False)
    assert len(made) == 6
    for positions, (rows, longest), labels in made:
        assert positions == (labels[:, 1:] != IGNORED).sum()
        planned = plan_of(spec, tokens=longest).job
        assert planned.batch == rows and positions <= rows * (planned.logit_columns or planned.length)
        assert train_on_prompt or positions < rows * 8 < rows * longest


# --- a run that goes astray, and one that is looked at ---


def test_a_loss_far_above_guessing_stops_the_run_and_keeps_the_checkpoint_before(tiny_spec, tmp_path, monkeypatch):
    compute = trainer.RunTrainer.compute_loss

    def runaway(self, *args, **kwargs):
        return compute(self, *args, **kwargs) * (100 if self.state.global_step >= 7 else 1)

    monkeypatch.setattr(trainer.RunTrainer, "compute_loss", runaway)
    with pytest.raises(
        ValueError, match=r"the loss is \d+\.\d at step 8, guessing among all tokens has 4\..: training"
    ):
        finetune(tiny_spec(), tmp_path, progress=False)
    folder = run_folder(tmp_path, tiny_spec())
    assert not is_done(folder) and [p.name for p in (folder / "checkpoints").glob("*-6")] == ["checkpoint-6"]
    assert "training diverged" in json.loads((folder / "failure.json").read_text())["error"]


def test_parameters_that_are_no_numbers_are_not_saved(tiny_spec, tmp_path, monkeypatch):
    step = trainer.RunTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 5:  # the last before the second checkpoint
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(trainer.RunTrainer, "training_step", poisoned)
    with pytest.raises(ValueError, match="is not finite at step 6: training diverged.*checkpoint before it is kept"):
        finetune(tiny_spec(), tmp_path, progress=False)
    folder = run_folder(tmp_path, tiny_spec()) / "checkpoints"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]


def test_the_curve_grows_while_the_run_goes_on(tiny_spec, tmp_path, monkeypatch):
    folder, seen = run_folder(tmp_path, tiny_spec()), []
    on_step_end = guards.AtCheckpoints.on_step_end

    def look(self, args, state, *rest, **kwargs):
        seen.append(len(read_lines(folder / LIVE_CURVE)))
        return on_step_end(self, args, state, *rest, **kwargs)

    monkeypatch.setattr(guards.AtCheckpoints, "on_step_end", look)
    finetune(tiny_spec(), tmp_path, progress=False)
    assert seen == list(range(12)) and not (folder / LIVE_CURVE).exists()
    assert len(read_lines(folder / "curve.jsonl")) == 12


def test_a_run_that_goes_on_begins_its_curve_with_what_its_checkpoint_had_seen(tiny_spec, tmp_path, monkeypatch):
    folder = run_folder(tmp_path, tiny_spec())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_evaluate", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny_spec(), tmp_path, progress=False)
    before = (folder / LIVE_CURVE).read_bytes()
    finetune(tiny_spec(), tmp_path, progress=False)
    assert (folder / "curve.jsonl").read_bytes() == before and len(read_predictions(folder)) == 24


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw-8bit"},
        {"quantisation": "nf4", "dtype": "bfloat16"},
        {"gradient_checkpointing": True, "length_grouped": True, "micro_batch_size": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_run_with_these_options_goes_on_to_the_same_adapter(tiny_spec, tmp_path, changes):
    spec, seen = tiny_spec(**changes), []
    finetune(spec, tmp_path / "whole", progress=False)

    def stop(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards.AtCheckpoints, "on_save", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(spec, tmp_path / "stopped", progress=False)
    assert finetune(spec, tmp_path / "stopped", progress=False).result.resumed
    close(*(adapter_of(run_folder(tmp_path / name, spec)) for name in ("whole", "stopped")), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},  # with scaled gradients
        {"dtype": "bfloat16", "gradient_checkpointing": True, "optimizer": "paged-adamw"},
        {"dtype": "bfloat16", "quantisation": "nf4", "optimizer": "adamw-8bit"},
        {"dtype": "bfloat16", "quantisation": "int8"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_run_on_a_gpu(tiny_spec, tmp_path, changes):
    spec = tiny_spec(**changes)
    record = finetune(spec, tmp_path, progress=False)
    assert record.result.n == 24
    curve = read_lines(run_folder(tmp_path, spec) / "curve.jsonl")
    assert curve[-1]["loss"] < curve[0]["loss"]
