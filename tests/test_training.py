"""One run: it repeats bit for bit, goes on where it was stopped, and says what went wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dora_lab import guards, sealed, trainer, training
from dora_lab.adapters import METHODS, AdapterConfig, attach
from dora_lab.checkpoint import load_adapter
from dora_lab.data import load_examples, tokenized
from dora_lab.evaluation import as_row, likelihood
from dora_lab.files import read_lines
from dora_lab.models import load_base
from dora_lab.records import is_done, read_failures, read_predictions, read_record, run_folder
from dora_lab.training import finetune

ROWS = ("predictions.jsonl", "curve.jsonl", "geometry.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(tiny_spec, tmp_path_factory):
    """Folder of a finished run by method."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    for method in METHODS:
        finetune(tiny_spec(method=method), runs, progress=False)
    return {method: run_folder(runs, tiny_spec(method=method)) for method in METHODS}


def _same(one: Path, other: Path) -> bool:
    """Whether two runs gave the same bytes: answers, scores, losses, geometry and adapters."""
    names = [*ROWS, *(str(path.relative_to(one)) for path in one.glob("*/*.safetensors"))]
    assert len(names) == len(ROWS) + 1
    weights, rows = names[-1], names[:-1]
    ours, theirs = load_file(one / weights), load_file(other / weights)  # the header's order is not fixed
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return same and all((one / name).read_bytes() == (other / name).read_bytes() for name in rows)


# --- what a run writes ---


@pytest.mark.parametrize("method", METHODS)
def test_the_record_is_what_the_files_say(uninterrupted, tiny_spec, method):
    folder = uninterrupted[method]
    record, predictions = read_record(folder), read_predictions(folder)
    assert record.spec == tiny_spec(method=method)
    assert record.result.n == len(predictions) == 24 and not record.result.resumed
    assert record.result.correct == sum(p["prediction"] == p["gold"] for p in predictions)
    assert record.result.accuracy == record.result.correct / 24 and record.result.chance == 0.5
    assert all(p["prediction"] == max(p["log_likelihoods"], key=p["log_likelihoods"].get) for p in predictions)
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "record.json",
        *ROWS,
        "model" if method == "full" else "adapter",
    }


def test_the_learning_rate_warms_up_and_falls_to_zero(uninterrupted, tiny_spec):
    spec, curve = tiny_spec(), read_lines(uninterrupted["dora"] / "curve.jsonl")
    assert [row["step"] for row in curve] == list(range(1, spec.steps + 1))
    for row in curve:
        before = row["step"] - 1
        share = min(before / spec.warmup_steps, (spec.steps - before) / (spec.steps - spec.warmup_steps))
        assert row["learning_rate"] == pytest.approx(spec.learning_rate * share)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(uninterrupted, method):
    curve = read_lines(uninterrupted[method] / "curve.jsonl")
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert read_record(uninterrupted[method]).result.train_loss == pytest.approx(
        sum(row["loss"] for row in curve) / len(curve)
    )


@pytest.mark.parametrize("method", METHODS)
def test_geometry_is_measured_at_four_steps_on_query_and_value(uninterrupted, method):
    rows = read_lines(uninterrupted[method] / "geometry.jsonl")
    assert [(r["step"], r["layer"], r["module"]) for r in rows] == [
        (step, layer, module) for step in (3, 6, 9, 12) for layer in (0, 1) for module in ("q_proj", "v_proj")
    ]
    assert all(r["delta_magnitude"] > 0 for r in rows)
    if method == "dora-magnitude":  # directions stay W0's
        assert all(r["delta_direction"] == pytest.approx(0, abs=1e-12) for r in rows)
    else:
        assert all(r["delta_direction"] > 1e-9 for r in rows)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_saved_answers_as_the_run_did(uninterrupted, tiny_spec, tiny_base, method):
    folder, spec = uninterrupted[method], tiny_spec(method=method)
    if method == "full":
        model, tokenizer = load_base(str(folder / "model"))
    else:
        model, tokenizer = load_base(str(tiny_base))
        load_adapter(model, folder / "adapter")
    questions = load_examples(spec.data, spec.task, "test")
    again = likelihood(model, tokenizer, questions, spec.prompt, spec.evaluation_batch_size)
    assert [as_row(p) for p in again] == read_predictions(folder)


def test_the_validation_split_is_evaluated_when_asked(tiny_spec, tmp_path):
    spec = tiny_spec(split="validation", steps=2)
    assert finetune(spec, tmp_path, progress=False).result.n == spec.validation_examples
    ids = [p["id"] for p in read_predictions(run_folder(tmp_path, spec))]
    assert ids == [f"boolq-validation-{i}" for i in range(spec.validation_examples)]


# --- the loss and the order ---


def test_the_loss_is_the_models_own_on_masked_labels(tiny_spec, tmp_path):
    spec = tiny_spec("hellaswag")
    model, tokenizer = load_base(spec.base_model)
    attach(model, AdapterConfig("lora", 2, 4.0), torch.Generator().manual_seed(0))
    rows, _ = tokenized(tokenizer, load_examples(spec.data, spec.task, "train", None, 10), spec.prompt, True, 64)
    batch = trainer.collate([rows[i] for i in range(5)])
    made = trainer.RunTrainer(spec, model.eval(), rows, tmp_path, progress=False)
    expected = model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).loss
    torch.testing.assert_close(made.compute_loss(model, batch), expected)


def test_the_order_follows_from_the_seed_and_reads_all_before_any_twice(tiny_spec):
    order = trainer.order([1] * 10, tiny_spec(steps=6, batch_size=4))
    assert len(order) == 24 and set(order[:10]) == set(order[10:20]) == set(range(10))
    assert order == trainer.order([1] * 10, tiny_spec(steps=6, batch_size=4, method="lora"))
    assert order != trainer.order([1] * 10, tiny_spec(steps=6, batch_size=4, seed=1))


def test_accumulated_steps_equal_one_large_step(tiny_spec, tmp_path):
    whole, parts = (tiny_spec(batch_size=b, gradient_accumulation=4 // b, dropout=0.0) for b in (4, 2))
    curves = []
    for spec in (whole, parts):
        finetune(spec, tmp_path, progress=False)
        curves.append([row["loss"] for row in read_lines(run_folder(tmp_path, spec) / "curve.jsonl")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_a_run_may_be_asked_with_another_prompt_than_it_was_trained_with(uninterrupted, tiny_spec, tiny_base, tmp_path):
    spec = tiny_spec(evaluation_prompt="alpaca")
    finetune(spec, tmp_path, progress=False)
    folder, plain = run_folder(tmp_path, spec), uninterrupted["dora"]
    assert (folder / "curve.jsonl").read_bytes() == (plain / "curve.jsonl").read_bytes()
    model, tokenizer = load_base(str(tiny_base))
    load_adapter(model, plain / "adapter")
    questions = load_examples(spec.data, spec.task, "test")
    again = likelihood(model, tokenizer, questions, "alpaca", spec.evaluation_batch_size)
    assert [as_row(p) for p in again] == read_predictions(folder) != read_predictions(plain)


# --- the best of the checkpoints ---


@pytest.fixture
def held_out_losses(monkeypatch):
    """`held_out_losses(losses)` lets every checkpoint have that loss by its step; returns the states seen, by step."""
    states = {}

    def give(losses: dict[int, float]):
        def loss(self, rows):
            assert len(rows) == 10
            states[self.state.global_step] = {n: p.detach().clone() for n, p in trainer.trained(self.model)}
            return losses[self.state.global_step]

        monkeypatch.setattr(trainer.RunTrainer, "_loss_on", loss)
        return states

    return give


@pytest.mark.parametrize(
    ("losses", "best"),
    [({3: 3, 6: 1, 9: 2, 12: 4}, 6), ({3: 1, 6: 1, 9: 1, 12: 1}, 3), ({3: 4, 6: 3, 9: 2, 12: 1}, 12)],
)
def test_the_checkpoint_with_the_lowest_loss_is_the_runs(tiny_spec, tmp_path, held_out_losses, losses, best):
    states, spec = held_out_losses(losses), tiny_spec(best_of_checkpoints=10)
    assert finetune(spec, tmp_path, progress=False).result.chosen_step == best
    saved = load_file(run_folder(tmp_path, spec) / "adapter" / "adapter_model.safetensors")
    ours = sorted(float(value.sum()) for value in saved.values())
    assert ours == pytest.approx(sorted(float(value.sum()) for value in states[best].values()))


def test_too_few_examples_to_choose_on_are_said(tiny_spec, tmp_path):
    with pytest.raises(ValueError, match="asks for 11 validation examples, boolq has 10: set it lower"):
        finetune(tiny_spec(best_of_checkpoints=11), tmp_path, progress=False)


def test_choosing_leaves_training_as_it_is(uninterrupted, tiny_spec, tmp_path):
    """The loss on held-out examples draws no random numbers, though this run has dropout."""
    spec = tiny_spec(best_of_checkpoints=10)
    assert finetune(spec, tmp_path, progress=False).result.chosen_step in (3, 6, 9, 12)
    for name in ("curve.jsonl", "geometry.jsonl"):
        assert (run_folder(tmp_path, spec) / name).read_bytes() == (uninterrupted["dora"] / name).read_bytes()


@pytest.mark.parametrize("checkpoints", [1, 3, 4])
def test_a_stopped_run_remembers_the_best_checkpoint(tiny_spec, tmp_path, held_out_losses, checkpoints):
    held_out_losses({3: 3, 6: 1, 9: 2, 12: 4})
    spec = tiny_spec(best_of_checkpoints=10)
    finetune(spec, tmp_path / "whole", progress=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _stop_after(monkeypatch, checkpoints)
        with pytest.raises(KeyboardInterrupt):
            finetune(spec, tmp_path / "stopped", progress=False)
    result = finetune(spec, tmp_path / "stopped", progress=False).result
    assert result.resumed and result.chosen_step == 6
    assert _same(run_folder(tmp_path / "whole", spec), run_folder(tmp_path / "stopped", spec))


# --- repeating and going on ---


@pytest.mark.parametrize("method", METHODS)
def test_the_same_run_gives_the_same_bits(uninterrupted, tiny_spec, tmp_path, method):
    torch.manual_seed(123)  # what went on before does not matter
    finetune(tiny_spec(method=method), tmp_path, progress=False)
    assert _same(uninterrupted[method], run_folder(tmp_path, tiny_spec(method=method)))


def test_another_seed_gives_another_run(uninterrupted, tiny_spec, tmp_path):
    finetune(tiny_spec(seed=1), tmp_path, progress=False)
    other = run_folder(tmp_path, tiny_spec(seed=1))
    assert (other / "curve.jsonl").read_bytes() != (uninterrupted["dora"] / "curve.jsonl").read_bytes()


def _stop_after(monkeypatch, checkpoints: int):
    """Ctrl-C right after so many checkpoints."""
    seen = []

    def on_save(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        if len(seen) == checkpoints:
            raise KeyboardInterrupt

    monkeypatch.setattr(guards.AtCheckpoints, "on_save", on_save)


@pytest.fixture
def stopped(tiny_spec, tmp_path):
    """`stopped(method, checkpoints)`: the folder of a run that was stopped."""

    def stop(method="dora", checkpoints=2):
        with pytest.MonkeyPatch.context() as monkeypatch:
            _stop_after(monkeypatch, checkpoints)
            with pytest.raises(KeyboardInterrupt):
                finetune(tiny_spec(method=method), tmp_path, progress=False)
        return run_folder(tmp_path, tiny_spec(method=method))

    return stop


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpoints", [1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_bits(uninterrupted, tiny_spec, stopped, tmp_path, method, checkpoints):
    folder = stopped(method, checkpoints)
    assert not is_done(folder) and not (folder / "failure.json").exists()
    assert finetune(tiny_spec(method=method), tmp_path, progress=False).result.resumed
    assert _same(uninterrupted[method], folder)
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, tiny_spec, stopped, tmp_path, name):
    folder = stopped(checkpoints=3)
    last, before = folder / "checkpoints" / "checkpoint-9", folder / "checkpoints" / "checkpoint-6"
    (last / name).write_bytes((last / name).read_bytes()[:-20])
    assert sealed.last_whole_checkpoint(folder / "checkpoints") == before and not last.exists()
    assert finetune(tiny_spec(), tmp_path, progress=False).result.resumed
    assert _same(uninterrupted["dora"], folder)


def test_half_written_checkpoints_mean_a_fresh_start(uninterrupted, tiny_spec, stopped, tmp_path):
    folder = stopped(checkpoints=2)
    first, second = sorted((folder / "checkpoints").glob("checkpoint-*"))
    (first / sealed.SEAL).unlink()
    (second / sealed.SEAL).write_text("{")
    assert not finetune(tiny_spec(), tmp_path, progress=False).result.resumed
    assert _same(uninterrupted["dora"], folder)


CHILD = """
import sys
from dora_lab.profiles import load_profile
from dora_lab.specs import RunSpec
from dora_lab.training import finetune
profile, runs, steps = sys.argv[1:]
finetune(RunSpec.from_profile(load_profile(profile), "boolq", "dora", steps=int(steps)), runs)
"""


def test_a_killed_process_is_gone_on_with_to_the_same_bits(tiny_profile, tiny_spec, tmp_path):
    spec = tiny_spec(steps=120)
    folder = run_folder(tmp_path / "killed", spec)
    command = [sys.executable, "-c", CHILD, str(tiny_profile), str(tmp_path / "killed"), "120"]
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while not list(folder.glob(f"checkpoints/*/{sealed.SEAL}")) and time.monotonic() < until:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not is_done(folder)
    assert finetune(spec, tmp_path / "killed", progress=False).result.resumed
    finetune(spec, tmp_path / "whole", progress=False)
    assert _same(run_folder(tmp_path / "whole", spec), folder)


def test_a_finished_run_is_not_done_again(uninterrupted, tiny_spec, monkeypatch):
    monkeypatch.setattr(training, "_run", None)
    folder = uninterrupted["dora"]
    assert finetune(tiny_spec(), folder.parents[1]) == read_record(folder)


def test_the_number_of_threads_is_put_back(tiny_spec, tmp_path):
    before = torch.get_num_threads()
    finetune(tiny_spec(steps=1, threads=before + 1), tmp_path, progress=False)
    assert torch.get_num_threads() == before


def test_progress_is_a_line_a_checkpoint_and_nothing_else_is_printed(tiny_spec, tmp_path, capfd):
    finetune(tiny_spec(), tmp_path / "loud")
    said, noise = capfd.readouterr()
    assert [line.split(":")[0] for line in said.splitlines()][:4] == [f"step {n} of 12" for n in (3, 6, 9, 12)]
    assert len(said.splitlines()) == 5 and noise == ""
    finetune(tiny_spec(), tmp_path / "quiet", progress=False)
    assert capfd.readouterr() == ("", "")


# --- what goes wrong ---


def test_a_rank_larger_than_a_matrix_is_named_and_noted(tiny_spec, tmp_path):
    spec = tiny_spec(rank=33, alpha=66.0)
    with pytest.raises(ValueError, match=r"rank 33 .*layers\.0\.self_attn\.q_proj.*at most 32"):
        finetune(spec, tmp_path, progress=False)
    (failure,) = read_failures(tmp_path / "tiny")
    assert failure["rank"] == 33 and failure["error"].startswith("ValueError: rank 33")


def test_a_loss_that_is_no_number_is_an_error(tiny_spec, tmp_path, monkeypatch):
    loss_of = trainer.answer_loss
    monkeypatch.setattr(trainer, "answer_loss", lambda *a: (loss_of(*a)[0] * float("nan"), loss_of(*a)[1]))
    with pytest.raises(ValueError, match="the loss is nan at step 1: training diverged; lower the learning rate"):
        finetune(tiny_spec(), tmp_path, progress=False)


def test_a_full_disk_while_saving_is_named_and_the_run_goes_on_later(uninterrupted, tiny_spec, tmp_path, monkeypatch):
    save, calls = trainer.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path)

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint-6 .*No space left.*: free space there"):
        finetune(tiny_spec(), tmp_path, progress=False)
    folder = run_folder(tmp_path, tiny_spec())
    assert "No space left" in json.loads((folder / "failure.json").read_text())["error"]
    assert finetune(tiny_spec(), tmp_path, progress=False).result.resumed
    assert _same(uninterrupted["dora"], folder) and not (folder / "failure.json").exists()


def test_training_is_not_lost_when_the_record_cannot_be_written(uninterrupted, tiny_spec, tmp_path, monkeypatch):
    folder = run_folder(tmp_path, tiny_spec())
    (folder / "curve.jsonl").mkdir(parents=True)
    with pytest.raises(OSError, match=r"cannot write .*curve\.jsonl"):
        finetune(tiny_spec(), tmp_path, progress=False)
    (folder / "curve.jsonl").rmdir()
    monkeypatch.setattr(trainer.RunTrainer, "training_step", None)  # no step is taken again
    assert finetune(tiny_spec(), tmp_path, progress=False).result.resumed
    assert _same(uninterrupted["dora"], folder)


def test_a_damaged_record_is_not_overwritten(uninterrupted, tiny_spec, tmp_path):
    folder = run_folder(tmp_path, tiny_spec())
    shutil.copytree(uninterrupted["dora"], folder)
    (folder / "record.json").write_text("{")
    with pytest.raises(ValueError, match=rf"record.json is damaged .*delete the folder {folder}"):
        finetune(tiny_spec(), tmp_path, progress=False)


def test_an_output_folder_that_cannot_be_made_is_named(tiny_spec, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match="cannot write to .*runs/tiny.*give another folder as runs_dir"):
        finetune(tiny_spec(), tmp_path / "runs", progress=False)


def test_a_base_that_has_gone_is_named(tiny_spec, tmp_path):
    with pytest.raises(FileNotFoundError, match="/nowhere/base does not exist"):
        finetune(replace(tiny_spec(), base_model="/nowhere/base"), tmp_path, progress=False)
