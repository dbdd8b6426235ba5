"""A cell of the grid: its command asks for its run and no other, and a scheduler is asked for what it takes."""

import os
import shlex
import threading

import pytest
import yaml

from dora_lab import preflight, worker
from dora_lab.cells import WORKER, cell_command, cell_environment, needs, shell_line
from dora_lab.profiles import PROJECT, load_profile
from dora_lab.records import run_folder
from dora_lab.shapes import SHAPES
from dora_lab.specs import PARAMETERS, RunSpec, spec_from_notebook


def given(command: list[str]) -> dict:
    """A notebook's variables after papermill has read the command."""
    values = {}
    for flag, name, value in zip(command, command[1:], command[2:], strict=False):
        if flag in ("-p", "-r"):
            values[name] = value if flag == "-r" else yaml.safe_load(value)
    return values


@pytest.mark.parametrize(
    "choices",
    [
        {"task": "boolq", "method": "full", "seed": 3},
        {"task": "hellaswag", "method": "dora", "rank": 2, "learning_rate": 0.0005, "steps": 7, "split": "validation"},
    ],
    ids=["full", "dora with everything given"],
)
def test_the_command_asks_for_the_run(tmp_path, monkeypatch, choices):
    monkeypatch.chdir(tmp_path)
    profile = yaml.safe_load((PROJECT / "data" / "profiles" / "smoke.yaml").read_text())
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(profile | {"name": "own"}))
    spec = RunSpec.from_profile(load_profile("own.yaml"), **choices)
    command = cell_command("own.yaml", spec, tmp_path / "runs")
    values = given(command)
    assert set(values) <= set(PARAMETERS) and str(WORKER) in command
    monkeypatch.chdir("/")  # where the cell runs, a relative path would mean another file
    assert spec_from_notebook(values) == (spec, tmp_path / "runs")
    assert str(run_folder(tmp_path / "runs", spec)) in command[command.index(str(WORKER)) + 1]


def test_a_line_for_a_shell_is_the_command_with_its_environment(tmp_path):
    profile = load_profile("smoke")
    spec = RunSpec.from_profile(profile, "boolq", "lora")
    there, _, line = shell_line("smoke", profile, spec, tmp_path / "with space").partition(" && ")
    words = shlex.split(line)
    assert there == f"cd {shlex.quote(str(PROJECT))}" and words[0] == "env"
    command = cell_command("smoke", spec, tmp_path / "with space")
    assert words[-len(command) :] == command
    assert {f"{k}={v}" for k, v in cell_environment(profile, spec).items()} <= set(words)
    assert "HF_HUB_OFFLINE=1" in words


def test_small_cells_need_a_core_and_what_was_measured(tmp_path):
    profile = load_profile("mini")
    wanted = needs(profile, RunSpec.from_profile(profile, "hellaswag", "full"))
    assert (wanted.threads, wanted.gpus) == (1, 0)
    assert 1000 < wanted.memory_mb < 3000  # records of such runs have up to 0.8 GB, papermill not counted
    assert 10 <= wanted.minutes <= 60


def test_llama_needs_a_gpu_its_weights_and_hours(monkeypatch):
    monkeypatch.setattr(preflight, "_shape", lambda spec: SHAPES["llama-7b"])
    profile = load_profile("llama-7b")
    short, long = (needs(profile, RunSpec.from_profile(profile, task, "dora")) for task in ("boolq", "winogrande"))
    assert short.gpus == long.gpus == 1 and short.threads == 4
    assert 13_477 < short.memory_mb < 20_000  # 13.5 GB in bfloat16
    assert 30 < short.minutes < long.minutes < 24 * 60


def test_a_run_of_several_processes_has_a_gpu_for_each(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "_shape", lambda spec: SHAPES["llama-7b"])
    values = yaml.safe_load((PROJECT / "data" / "profiles" / "llama-7b.yaml").read_text())
    (tmp_path / "four.yaml").write_text(yaml.safe_dump(values | {"processes": 4}))
    one, four = load_profile("llama-7b"), load_profile(tmp_path / "four.yaml")
    alone, shared = (needs(p, RunSpec.from_profile(p, "boolq", "dora")) for p in (one, four))
    assert (shared.gpus, shared.threads) == (4, 16)
    assert shared.minutes < alone.minutes and shared.memory_mb == pytest.approx(4 * alone.memory_mb, abs=4)


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(worker, "POLL_S", 0.02)
    monkeypatch.setattr(worker, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


def test_cells_on_one_machine_have_a_gpu_each_and_a_third_waits(two_gpus):
    third = threading.Event()

    def wait():
        with worker.own_gpus(1):
            third.set()

    with worker.own_gpus(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        with worker.own_gpus(1):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
            waiting = threading.Thread(target=wait)
            waiting.start()
            assert not third.wait(0.3)
        assert third.wait(10)
        waiting.join()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_cell_takes_what_it_was_given_where_there_is_nothing_to_choose(two_gpus):
    with worker.own_gpus(0), worker.own_gpus(2):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_the_visible_gpus_are_those_that_a_scheduler_left(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab/1")
    assert worker.visible_gpus() == ["3", "GPU-ab/1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert worker.visible_gpus() == []
