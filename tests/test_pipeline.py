"""The grid through papermill, on the smoke profile: resume, failures, refused parameters."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields, replace

import pytest

from dora_lab import pipeline
from dora_lab.cells import WORKER
from dora_lab.profiles import load_profile
from dora_lab.records import RunRecord, RunResult, read_records, run_folder, write_record
from dora_lab.specs import RunSpec
from dora_lab.tables import read_published, results_table


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


def test_an_error_of_the_grids_own_ends_the_runs_that_have_begun(tmp_path, monkeypatch):
    noted = tmp_path / "pid"
    commands = [["sh", "-c", f"echo $$ > {noted}.new; mv {noted}.new {noted}; exec sleep 60"]]

    def cell_command(*arguments):
        if commands:
            return commands.pop()
        while not noted.exists():
            time.sleep(0.01)
        return [str(tmp_path / "no such program")]

    monkeypatch.setattr(pipeline, "cell_command", cell_command)
    specs = _specs(("boolq", "dora"), ("winogrande", "lora"))
    with pytest.raises(FileNotFoundError, match="no such program"):
        pipeline.run_grid("smoke", specs, tmp_path, jobs=2, report=str)
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), signal.SIGKILL)


def test_a_grid_takes_no_more_cores_than_it_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    monkeypatch.setattr(pipeline, "cell_command", lambda *arguments: ["true"])
    said = []
    pipeline.run_grid("smoke", _specs(("boolq", "dora")), tmp_path, report=said.append)
    assert said[0].endswith(", 1 at a time")


def test_unknown_parameters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter 'tsk'"):
        pipeline.run_chapter("07_fine_tune", tmp_path / "out.ipynb", tsk="boolq")


def test_plain_papermill_refuses_a_mistyped_parameter(tmp_path):
    command = [sys.executable, "-m", "papermill", str(WORKER), str(tmp_path / "out.ipynb")]
    command += ["-p", "profile", "smoke", "-p", "task", "boolq", "-p", "method", "dora", "-p", "sed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert "did you mean 'seed'" in done.stderr


def test_a_place_that_cannot_be_written_is_named_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="runs_dir"):
        pipeline.preflight(tmp_path / "file" / "runs")


def test_ranks_are_for_the_methods_that_have_one():
    specs = pipeline.grid(load_profile("mini"), [0], ["full", "dora"], [1, 8])
    assert {(spec.method, spec.rank) for spec in specs} == {("full", None), ("dora", 1), ("dora", 8)}


def test_records_of_other_settings_are_told_apart(tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    own = RunSpec.from_profile(profile, "boolq", "lora", rank=1, seed=1)
    others = [replace(own, learning_rate=0.02), replace(own, split="validation"), replace(own, base_sha256="0")]
    records = [RunRecord(spec, _result(0.5), {}) for spec in [own, *others]]
    assert [record.spec for record in pipeline.of_profile(profile, records)] == [own]


def test_recording_replaces_what_the_profile_no_longer_gives(tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    runs, target = tmp_path / "runs", tmp_path / "recorded"
    now = RunSpec.from_profile(profile, "boolq", "lora")
    before = replace(now, learning_rate=0.02)
    other_seed = replace(now, seed=5)
    for spec, parent in ((before, target), (other_seed, target), (now, runs / profile.name)):
        folder = parent / spec.run_id
        (folder / "adapter").mkdir(parents=True)
        write_record(folder, RunRecord(spec, _result(0.5), {}))
    assert pipeline.record_results(profile, runs, target) == 1
    assert {path.name for path in target.iterdir()} == {now.run_id, other_seed.run_id}
    assert not (target / now.run_id / "adapter").exists()


def _result(accuracy: float) -> RunResult:
    zeros = {f.name: 0 for f in fields(RunResult) if f.default is MISSING}
    return RunResult(**zeros | {"accuracy": accuracy, "n": 10, "resumed": False})


def test_variants_are_runs_of_the_grid_with_rows_of_their_own(tiny_profile, tmp_path):
    """Plain runs and variants side by side: run ids, `of_profile`, table."""
    path = tmp_path / "varied.yaml"
    path.write_text(
        f"extends: {tiny_profile}\nname: varied\ntasks: [boolq]\nvariants: {{short: {{steps: {{boolq: 2}}}}}}\n"
    )
    profile = load_profile(path)
    specs = pipeline.grid(profile, [0], ["dora"])
    assert [spec.variant for spec in specs] == [None, "short"]
    assert specs[0].run_id == RunSpec.from_profile(load_profile(tiny_profile), "boolq", "dora").run_id
    assert specs[1].run_id.startswith("boolq-dora-short-r") and specs[1].steps == 2
    assert pipeline.grid(profile, [0], ["dora"], variants=["short"]) == specs[1:]
    summary = pipeline.run_grid(str(path), specs, tmp_path / "runs", report=lambda line: None)
    assert summary.done_now == 2
    records, damaged = read_records(tmp_path / "runs" / "varied")
    assert not damaged and pipeline.of_profile(profile, records) == records
    assert pipeline.of_profile(load_profile(tiny_profile), records) == records[:1]
    table = results_table(records, [], read_published(), "varied")
    own = table[table["source"] == "profile varied"]
    assert list(own["row"]) == ["this run DoRA", "this run DoRA, short"]
    assert [round(100 * r.result.accuracy, 4) for r in records] == [round(a, 4) for a in own["boolq"]]
