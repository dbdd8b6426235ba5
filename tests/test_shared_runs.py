"""One run by several processes: what a run of one process comes to, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from dora_lab import training
from dora_lab.profiles import load_profile
from dora_lab.records import RunSpec, read_lines, read_predictions, read_record, run_folder
from dora_lab.training import finetune

without_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")


@pytest.fixture
def without_dropout(tiny_profile, tmp_path) -> Path:
    """Each process drops numbers of its own, so that only runs without dropout can be compared."""
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(tiny_profile.read_text()) | {"dropout": 0.0}))
    return path


def launch(profile: Path, runs: Path, *arguments: str, count: int = 2) -> subprocess.CompletedProcess:
    """A run by `count` processes. `accelerate launch` starts them with the same environment where there are GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "dora_lab.training", "--profile", str(profile), "--task", "boolq", "--method", "dora"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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
