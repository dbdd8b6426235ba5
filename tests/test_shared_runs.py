"""One run by several processes: what a run of one process comes to, and what is refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from dora_lab import shards, training
from dora_lab.files import read_lines
from dora_lab.launch import fine_tune, launch_command
from dora_lab.profiles import load_profile
from dora_lab.records import read_failures, read_predictions, read_record, run_folder
from dora_lab.specs import RunSpec
from dora_lab.training import finetune

without_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")


@pytest.fixture
def without_dropout(tiny_profile, tmp_path) -> Path:
    """Each process drops numbers of its own, so that only runs without dropout can be compared."""
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(tiny_profile.read_text()) | {"dropout": 0.0}))
    return path


def launch(
    profile: Path, runs: Path, *arguments: str, count: int = 2, fsdp: bool = False, script: Path | None = None
) -> subprocess.CompletedProcess:
    """A run by `count` processes. `accelerate launch` starts them with the same environment where there are GPUs.

    script: what is run instead of the module; it ends by calling the module's `main`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [str(script)] if script else ["-m", "dora_lab.training"]
    command += ["--profile", str(profile), "--task", "boolq", "--method", "dora"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"ACCELERATE_USE_FSDP": "true"} if fsdp else {}
    command += ["--runs-dir", str(runs), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@without_gloo
def test_a_run_of_two_processes_is_the_run_of_one(without_dropout, tmp_path):
    spec = RunSpec.from_profile(load_profile(without_dropout), "boolq", "dora")
    finetune(spec, tmp_path / "one", progress=False)
    done = launch(without_dropout, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 12 of 12") == 1  # one of them speaks
    one, two = (run_folder(tmp_path / name, spec) for name in ("one", "two"))
    assert read_record(two).result.processes == 2 and read_record(two).result.micro_batch_size == 4
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    expected, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    losses = [[row["loss"] for row in read_lines(folder / "curve.jsonl")] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for ours, theirs in zip(read_predictions(one), read_predictions(two), strict=True):
        assert ours["id"] == theirs["id"] and ours["prediction"] == theirs["prediction"]
        assert ours["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=1e-5)
    again = launch(without_dropout, tmp_path / "two")
    assert again.returncode == 0 and "step" not in again.stdout  # done before


@pytest.mark.slow
@without_gloo
def test_two_processes_go_on_from_the_checkpoint_of_one(without_dropout, tmp_path, monkeypatch):
    spec = RunSpec.from_profile(load_profile(without_dropout), "boolq", "dora")
    monkeypatch.setattr(training, "_evaluate", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(spec, tmp_path, progress=False)
    done = launch(without_dropout, tmp_path)
    assert done.returncode == 0 and "going on from step 12" in done.stdout
    assert read_record(run_folder(tmp_path, spec)).result.resumed


@pytest.mark.slow
@without_gloo
def test_processes_that_cannot_share_a_micro_batch_are_refused(without_dropout, tmp_path):
    done = launch(without_dropout, tmp_path, count=3)
    assert done.returncode != 0
    assert (
        "3 processes cannot share micro-batches of 4: set micro_batch_size to a multiple of their number" in done.stderr
    )


def test_a_run_from_the_command_line_says_what_is_wrong_in_a_line(tiny_profile, tmp_path):
    with pytest.raises(SystemExit, match="error: unknown task 'bool-q': choose one of"):
        training.main(
            ["--profile", str(tiny_profile), "--task", "bool-q", "--method", "dora", "--runs-dir", str(tmp_path)]
        )
    training.main(
        [
            "--profile",
            str(tiny_profile),
            "--task",
            "boolq",
            "--method",
            "lora",
            "--steps",
            "1",
            "--runs-dir",
            str(tmp_path),
        ]
    )
    assert list(tmp_path.glob("tiny/*/record.json"))


def with_processes(profile: Path, tmp_path: Path, **values) -> Path:
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(profile.read_text()) | values))
    return path


def test_the_profile_says_how_a_run_is_shared(without_dropout, tmp_path):
    ddp = launch_command(load_profile(with_processes(without_dropout, tmp_path, processes=4)), {"task": "boolq"})
    assert "--num_processes=4" in ddp and "--multi_gpu" in ddp and "--use_fsdp" not in ddp
    assert ddp[-3:] == ["-m", "dora_lab.training", "--task=boolq"]
    fsdp = load_profile(with_processes(without_dropout, tmp_path, processes=2, sharding="fsdp"))
    assert {"--use_fsdp", "--fsdp_version=2"} <= set(launch_command(fsdp, {}))
    with pytest.raises(ValueError, match="3 processes cannot share micro-batches of 4: set micro_batch_size to"):
        load_profile(with_processes(without_dropout, tmp_path, processes=3))


def test_how_a_run_is_shared_is_no_part_of_its_identity(without_dropout, tmp_path):
    alone = RunSpec.from_profile(load_profile(without_dropout), "boolq", "dora")
    shared = load_profile(with_processes(without_dropout, tmp_path, processes=2, sharding="fsdp"))
    assert RunSpec.from_profile(shared, "boolq", "dora") == alone


# --- FSDP ---

# Every checkpoint is taken of a sharded model; the second one is the last, in `stopped`.
SHARDED = """
import sys
from dora_lab import guards, shards, training

saved = []

def on_save(self, args, state, control, **kwargs):
    saved.append(state.global_step)
    assert shards.is_sharded(self.trainer.model)
    assert all(p.to_local().numel() < p.numel() for p in self.trainer.model.parameters())
    assert len(saved) < {most}, "stopped"

guards.AtCheckpoints.on_save = on_save
training.main(sys.argv[1:])
"""


def sharded(folder: Path, most: int) -> Path:
    path = folder / f"sharded_{most}.py"
    path.write_text(SHARDED.format(most=most))
    return path


def assert_same_run(one: Path, other: Path) -> None:
    expected, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    for file, keys in (("curve.jsonl", ("loss",)), ("geometry.jsonl", ("delta_magnitude", "delta_direction"))):
        rows = [[[row[key] for key in keys] for row in read_lines(folder / file)] for folder in (one, other)]
        torch.testing.assert_close(*map(torch.tensor, rows), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(read_predictions(one), read_predictions(other), strict=True):
        assert ours["id"] == theirs["id"] and ours["prediction"] == theirs["prediction"]
        assert ours["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=1e-5)


@pytest.mark.slow
@without_gloo
def test_a_sharded_run_is_the_run_of_one_process_stopped_or_not(without_dropout, tmp_path):
    """What it had saved when it was stopped serves shards again, and one process that keeps its model whole."""
    spec = RunSpec.from_profile(load_profile(without_dropout), "boolq", "dora")
    finetune(spec, tmp_path / "one", progress=False)
    one, through, again, alone = (run_folder(tmp_path / name, spec) for name in ("one", "through", "again", "alone"))
    done = launch(without_dropout, tmp_path / "through", fsdp=True, script=sharded(tmp_path, 99))
    assert done.returncode == 0, done.stderr
    assert_same_run(one, through)
    stopped = launch(without_dropout, tmp_path / "again", fsdp=True, script=sharded(tmp_path, 2))
    assert stopped.returncode != 0 and "AssertionError: stopped" in stopped.stderr
    shutil.copytree(tmp_path / "again", tmp_path / "alone")
    done = launch(without_dropout, tmp_path / "again", fsdp=True)
    assert done.returncode == 0 and "going on from step 6" in done.stdout, done.stderr
    assert finetune(spec, tmp_path / "alone", progress=False).result.resumed
    assert_same_run(one, again)
    assert_same_run(one, alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, "full fine-tuning is not offered: choose lora, dora or dora-magnitude"),
        ({"quantisation": "nf4"}, "a base in nf4 cannot be cut: set quantisation to none"),
        ({"optimizer": "paged-adamw"}, "paged-adamw does not know parts: set optimizer to adamw"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_what_to_set(tiny_spec, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(shards, "asked_for", lambda: True)
    with pytest.raises(ValueError, match=rf"FSDP is asked for \(ACCELERATE_USE_FSDP\); {message}, or launch without"):
        finetune(tiny_spec(**changes), tmp_path, progress=False)


def test_one_process_keeps_its_model_whole(tiny_spec, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert finetune(tiny_spec(steps=2, checkpoints=1), tmp_path, progress=False).result.processes == 1


# --- out of memory ---

# The second of two processes has no memory for two examples at a time, from its fifth step on.
WITHOUT_MEMORY = """
import sys
import torch
from dora_lab import processes, trainer, training

compute = trainer.RunTrainer.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    if processes.rank() == 1 and self.state.global_step >= 4 and len(inputs["input_ids"]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return compute(self, model, inputs, *args, **kwargs)

trainer.RunTrainer.compute_loss = compute_loss
training.main(sys.argv[1:])
"""


@pytest.mark.slow
@without_gloo
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_a_process_that_runs_out_of_memory_ends_the_run_which_goes_on_with_less_at_a_time(
    without_dropout, tmp_path, fsdp
):
    spec = RunSpec.from_profile(load_profile(without_dropout), "boolq", "dora")
    script = tmp_path / "without_memory.py"
    script.write_text(WITHOUT_MEMORY)
    ended = launch(without_dropout, tmp_path / "two", fsdp=fsdp, script=script)
    assert ended.returncode != 0
    said = (
        r"micro-batches of 4 in process 1 \(CUDA out of memory.*run the same command again.*checkpoint with 2 at a time"
    )
    (failure,) = read_failures(tmp_path / "two" / "tiny")
    assert re.search(said, failure["error"]) and re.search(said, ended.stderr)
    done = launch(without_dropout, tmp_path / "two", fsdp=fsdp, script=script)
    assert done.returncode == 0 and "going on from step 3" in done.stdout, done.stderr
    finetune(spec, tmp_path / "one", progress=False)
    one, two = (run_folder(tmp_path / name, spec) for name in ("one", "two"))
    assert read_record(two).result.micro_batch_size == 2
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert_same_run(one, two)


@pytest.mark.slow
@without_gloo
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_cell_of_the_grid_is_done_by_the_processes_of_its_profile(without_dropout, tmp_path, monkeypatch, sharding):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = with_processes(without_dropout, tmp_path, processes=2, sharding=sharding, geometry=sharding == "ddp")
    given = {"profile": str(path), "task": "boolq", "method": "dora", "seed": 0, "rank": None, "runs_dir": ""}
    spec = RunSpec.from_profile(load_profile(path), "boolq", "dora")
    record = fine_tune(given, spec, tmp_path / "two")
    assert record.spec == spec and record.result.processes == 2
    alone = finetune(spec, tmp_path / "one", progress=False)
    assert alone.result.train_loss == pytest.approx(record.result.train_loss, rel=1e-4)
    for ours, theirs in zip(*(read_predictions(run_folder(tmp_path / n, spec)) for n in ("one", "two")), strict=True):
        assert ours["prediction"] == theirs["prediction"]


def test_processes_that_fail_are_quoted(without_dropout, tmp_path, monkeypatch):
    path = with_processes(without_dropout, tmp_path, processes=2)
    spec = RunSpec.from_profile(load_profile(path), "boolq", "dora")
    said = "W1 a warning\nerror: the disk is full\nTraceback of the launcher\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **how: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(RuntimeError, match="^2 processes could not do the run: error: the disk is full$"):
        fine_tune({"profile": str(path), "task": "boolq", "method": "dora"}, spec, tmp_path)


def test_only_the_kernel_of_a_cell_leaves_out_what_its_run_does_not_need(tiny_profile, tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom dora_lab.launch import fine_tune\nfrom dora_lab.profiles import "
        "load_profile\nfrom dora_lab.records import RunSpec\nprofile, runs = sys.argv[1:]\n"
        "spec = RunSpec.from_profile(load_profile(profile), 'boolq', 'lora', steps=1)\n"
        "fine_tune({'profile': profile, 'task': 'boolq', 'method': 'lora'}, spec, Path(runs))\n"
        "print(sys.modules.get('bitsandbytes', 'not asked for') is None)"
    )
    command = [sys.executable, "-c", code, str(tiny_profile), str(tmp_path)]
    of_a_cell = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DORA_LAB_GPUS": "0"})
    of_a_student = subprocess.run(command, capture_output=True, text=True)
    assert of_a_cell.stdout.splitlines()[-1:] == ["True"], of_a_cell.stderr
    assert of_a_student.stdout.splitlines()[-1:] == ["False"], of_a_student.stderr
