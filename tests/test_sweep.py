"""The sweep: the same trials for every method, the best mean wins, what failed cannot."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from dora_lab import sweep
from dora_lab.profiles import load_profile
from dora_lab.sweep import SWEEP, best_rates, read_sweep, run_sweep, sweep_specs


def _row(method, rate, seed, accuracy):
    return {"task": "boolq", "method": method, "learning_rate": rate, "seed": seed, "accuracy": accuracy}


def test_the_best_mean_wins_ties_go_to_the_lower_rate_and_a_failed_rate_is_out():
    rows = [_row("lora", 1e-3, s, a) for s, a in ((0, 0.6), (1, 0.8))]
    rows += [_row("lora", 3e-3, s, a) for s, a in ((0, 0.7), (1, 0.7))]
    rows += [_row("lora", 1e-2, s, a) for s, a in ((0, 0.9), (1, None))]
    assert best_rates(rows) == {("lora", "boolq"): 1e-3}


def test_methods_that_were_not_given_the_same_trials_are_not_compared():
    rows = [_row("lora", 1e-3, 0, 0.6), _row("lora", 3e-3, 0, 0.7), _row("dora", 1e-3, 0, 0.6)]
    with pytest.raises(ValueError, match="same trials on boolq"):
        best_rates(rows)
    with pytest.raises(ValueError, match="lower rates"):
        best_rates([_row("lora", 1e-3, 0, None)])


@pytest.mark.slow
def test_a_sweep_gives_every_method_the_same_trials_on_validation_data(tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    specs = [spec for spec in sweep_specs(profile, ["lora", "dora"]) if spec.task == "boolq"]
    assert {spec.split for spec in specs} == {"validation"} and len(specs) == 4
    rows = run_sweep(specs, tmp_path, jobs=2, report=lambda line: None)
    assert read_sweep(tmp_path / profile.name / SWEEP) == rows
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert set(best_rates(rows)) == {("lora", "boolq"), ("dora", "boolq")}

    said = []
    assert run_sweep(specs, tmp_path, report=said.append) == rows
    assert said == ["4 runs: 4 done before, 0 to do"]
    elsewhere = tmp_path / "elsewhere"
    assert run_sweep(specs, elsewhere, report=said.append, recorded=rows) == rows  # same run ids: nothing to do
    assert said[-1] == "4 runs: 4 done before, 0 to do" and not list(elsewhere.glob("*/*/record.json"))


class Threads(ThreadPoolExecutor):
    """The sweep's pool in this process, so that what its workers call can be another thing."""

    sizes: list[int] = []

    def __init__(self, jobs, context, initializer, arguments):
        self.sizes.append(jobs)
        super().__init__(jobs)


@pytest.fixture
def few_specs(tiny_profile, monkeypatch):
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Threads)
    return [spec for spec in sweep_specs(load_profile(tiny_profile), ["lora", "dora"]) if spec.task == "boolq"]


def test_a_gpu_that_is_too_small_for_one_run_fails_that_run_alone(few_specs, tmp_path, monkeypatch):
    def finetune(spec, runs_dir, progress):
        if spec == few_specs[0]:
            raise RuntimeError("the GPU is too small")
        return SimpleNamespace(result=SimpleNamespace(accuracy=0.5))

    monkeypatch.setattr("dora_lab.training.finetune", finetune)
    said = []
    rows = run_sweep(few_specs, tmp_path, jobs=1, report=said.append)
    assert len(said) == 1 + len(few_specs) and "failed: the GPU is too small" in said[1]
    assert "0.500" in said[2] and rows[0]["accuracy"] is None
    assert read_sweep(tmp_path / few_specs[0].profile / SWEEP) == rows


def test_after_an_error_that_no_run_should_raise_the_rest_is_not_begun(few_specs, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("dora_lab.training.finetune", lambda spec, *_, **__: begun.append(spec) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_sweep(few_specs, tmp_path, jobs=1, report=str)
    assert len(begun) < len(few_specs)


def killed(spec, runs_dir):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_killed_is_told_with_what_to_do(tiny_profile, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_finetune_quietly", killed)
    with pytest.raises(RuntimeError, match="was killed, for want of memory perhaps: free some, or give fewer jobs"):
        run_sweep(sweep_specs(load_profile(tiny_profile), ["lora"])[:2], tmp_path, jobs=1, report=str)


def test_a_sweep_takes_no_more_cores_than_it_may_use(few_specs, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    monkeypatch.setattr(sweep, "_finetune_quietly", lambda spec, runs_dir: "0.5")
    run_sweep(few_specs, tmp_path, report=str)
    assert Threads.sizes[-1] == 1
