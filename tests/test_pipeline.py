"""The grid through papermill, on the smoke profile: resume, failures, refused parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_lab import pipeline
from dora_lab.profiles import load_profile
from dora_lab.records import RunSpec, run_folder


def _specs(*cells):
    profile = load_profile("smoke")
    return [RunSpec.from_profile(profile, task, method, seed=0) for task, method in cells]


def test_the_grid_is_every_task_method_and_seed():
    profile = load_profile("mini")
    specs = pipeline.grid(profile, seeds=[0, 1, 2])
    assert len(specs) == 3 * len(profile.tasks) * len(profile.methods) == len({spec.run_id for spec in specs})


def test_a_failed_run_is_named_the_rest_goes_on_and_finished_runs_are_kept(tmp_path):
    good, bad = _specs(("boolq", "dora"), ("winogrande", "lora"))
    broken = run_folder(tmp_path, bad)
    broken.mkdir(parents=True)
    (broken / "curve.jsonl").mkdir()  # the run cannot write its curve here
    said = []
    summary = pipeline.run_grid("smoke", [bad, good], tmp_path, jobs=2, report=said.append)
    assert list(summary.failed) == [bad.run_id] and summary.done_now == 1
    assert "curve.jsonl" in summary.failed[bad.run_id]
    assert json.loads((broken / "failure.json").read_text())["task"] == "winogrande"

    before = (run_folder(tmp_path, good) / "record.json").stat().st_mtime_ns
    (broken / "curve.jsonl").rmdir()
    again = pipeline.run_grid("smoke", [bad, good], tmp_path, jobs=2, report=said.append)
    assert (again.done_before, again.done_now, again.failed) == (1, 1, {})
    assert (run_folder(tmp_path, good) / "record.json").stat().st_mtime_ns == before
    assert not (broken / "failure.json").exists()


def test_unknown_parameters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter 'tsk'"):
        pipeline.run_chapter("07_fine_tune", tmp_path / "out.ipynb", tsk="boolq")


def test_plain_papermill_refuses_a_mistyped_parameter(tmp_path):
    command = [sys.executable, "-m", "papermill", str(pipeline.WORKER), str(tmp_path / "out.ipynb")]
    command += ["-p", "profile", "smoke", "-p", "task", "boolq", "-p", "method", "dora", "-p", "sed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert "did you mean 'seed'" in done.stderr


def test_a_place_that_cannot_be_written_is_named_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="runs_dir"):
        pipeline.preflight(tmp_path / "file" / "runs")


@pytest.mark.parametrize("arguments", [["--profile", "mimi"], ["--method", "dorra"]])
def test_the_command_line_refuses_what_does_not_exist(tmp_path, arguments):
    command = [str(Path(sys.executable).with_name("dora-lab")), "reproduce", "--runs-dir", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "choose one of" in done.stderr
