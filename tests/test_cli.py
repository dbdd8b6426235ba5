"""The command line as a user types it: what it prints, its exit codes, and what a stop leaves behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from typer import Exit
from typer.testing import CliRunner

from dora_lab import pipeline
from dora_lab.cli import app
from dora_lab.exits import told
from dora_lab.profiles import known_profiles, load_profile
from dora_lab.records import RunRecord, RunResult, read_records, run_folder, write_record
from dora_lab.specs import RunSpec

COMMAND = str(Path(sys.executable).with_name("dora-lab"))


def _call(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


def test_profiles_lists_every_profile_with_what_it_is_for():
    said = _call("profiles").stdout
    for name in known_profiles():
        assert f"{name} " in said and load_profile(name).summary in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["reproduce", "--profile", "mimi"], "choose one of"),
        (["reproduce", "--method", "dorra"], "choose one of"),
        (["reproduce", "--rank", "0"], "--rank"),
        (["reproduce", "--seed", "3"], "No such option"),
        (["reproduce", "--seeds", "0"], "--seeds"),
        (["sweep", "--profile", "nowhere.yaml"], "nowhere.yaml"),
        (["record", "--profile", "mimi"], "choose one of"),
    ],
)
def test_what_does_not_exist_is_refused_with_exit_code_2(tmp_path, arguments, named):
    done = _call(*arguments, "--runs-dir", tmp_path)
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr


def test_recording_without_runs_says_what_to_run_first(tmp_path):
    done = _call("record", "--profile", "smoke", "--runs-dir", tmp_path)
    assert done.returncode == 2 and "dora-lab reproduce" in done.stderr


def finished(runs: Path, spec: RunSpec, score: float = 0.5) -> None:
    """A run as the store has it, without doing it."""
    zeros = {f.name: 0 for f in fields(RunResult) if f.default is MISSING}
    result = RunResult(**zeros | {"accuracy": score, "resumed": False})
    folder = run_folder(runs, spec)
    folder.mkdir(parents=True)
    write_record(folder, RunRecord(spec, result, {}))


def recorded(runs: Path, profile: Path) -> str:
    done = CliRunner().invoke(app, ["record", "--profile", str(profile), "--runs-dir", str(runs)])
    assert done.exit_code == 0, done.output
    return done.output.strip()


def test_recording_says_where_the_records_are(tiny_profile, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "RECORDED", tmp_path / "results")
    finished(tmp_path / "runs", RunSpec.from_profile(load_profile(tiny_profile), "boolq", "lora"))
    assert recorded(tmp_path / "runs", tiny_profile) == f"1 runs recorded in {tmp_path / 'results' / 'tiny'}"


def test_runs_of_the_extended_profile_are_not_recorded_a_second_time(tiny_profile, tmp_path, monkeypatch):
    runs, results = tmp_path / "runs", tmp_path / "results"
    monkeypatch.setattr(pipeline, "RECORDED", results)
    middle, path = tmp_path / "middle.yaml", tmp_path / "own.yaml"
    middle.write_text(f"extends: {tiny_profile}\nname: middle\n")
    path.write_text("extends: middle.yaml\nname: own\nvariants: {same: {rank: 1}, short: {cutoff_tokens: 9}}\n")
    own, tiny = load_profile(path), load_profile(tiny_profile)
    for variant in (None, "same", "short"):
        finished(runs, RunSpec.from_profile(own, "boolq", "lora", variant=variant))
    assert recorded(runs, path) == f"3 runs recorded in {results / 'own'}"  # those of tiny are not recorded yet
    for rank in (2, 1):
        finished(runs, RunSpec.from_profile(tiny, "boolq", "lora", rank=rank))
    recorded(runs, tiny_profile)
    said = f"1 runs recorded in {results / 'own'}; 2 left out that are recorded already, as runs of middle or tiny"
    assert recorded(runs, path) == said
    assert [record.spec.variant for record in read_records(results / "own")[0]] == ["short"]
    assert len(read_records(results / "tiny")[0]) == 2

    path.write_text(f"extends: {tiny_profile}\nsummary: of the same name, so the same runs\n")
    assert recorded(runs, path) == f"2 runs recorded in {results / 'tiny'}"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = _call("reproduce", "--profile", "smoke", "--runs-dir", tmp_path / "file" / "runs")
    assert done.returncode == 2 and str(tmp_path / "file") in done.stderr


@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("allocate", "dora_lab.rank_study.allocate_all"),
        ("bench", "dora_lab.bench.run"),
        ("scaling", "dora_lab.scaling.measure"),
        ("measure-7b", "dora_lab.measure.measure"),
        ("claims", "dora_lab.claims.run_claims"),
    ],
)
def test_what_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch, command, work):
    begun = []
    monkeypatch.setattr(work, lambda *_, **__: begun.append(work) or 1 / 0)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out.json", tmp_path) if command != "claims" else (tmp_path / "file",):
        option = ["--figures-dir"] if command == "claims" else []
        done = CliRunner().invoke(app, [command, *option, str(place)])
        assert done.exit_code == 2 and str(place.parent) in done.stderr and not begun
    place = tmp_path / "new" / "out.json"
    done = CliRunner().invoke(app, [command, *option, str(place)])
    assert isinstance(done.exception, ZeroDivisionError) and place.parent.is_dir()


def test_an_error_that_ends_long_work_is_told_with_what_is_kept(capsys):
    with pytest.raises(Exit), told(RuntimeError, kept="finished runs are kept"):
        raise RuntimeError("a run was killed")
    assert capsys.readouterr().err == "error: a run was killed\nfinished runs are kept\n"
    with pytest.raises(Exit), told(RuntimeError, kept="finished runs are kept"):
        raise ValueError("unknown profile")  # nothing has begun
    assert capsys.readouterr().err == "error: unknown profile\n"


@pytest.fixture(scope="module")
def two_runs(tiny_profile, tmp_path_factory) -> Path:
    """A profile of two runs, long enough to be stopped between its checkpoints."""
    values = yaml.safe_load(tiny_profile.read_text())
    values |= {"name": "two", "tasks": ["boolq"], "methods": ["lora", "dora"], "steps": {"boolq": 60}, "seeds": [0]}
    path = tmp_path_factory.mktemp("two") / "two.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_grid_goes_on_and_keeps_what_was_finished(two_runs, tmp_path, stop):
    call = ["reproduce", "--profile", str(two_runs), "--jobs", "1", "--runs-dir", str(tmp_path)]
    process = subprocess.Popen(
        [COMMAND, *call],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in a shell's background ignores it
    )
    started = time.monotonic()
    while not list(tmp_path.glob("two/*/record.json")):
        assert process.poll() is None and time.monotonic() - started < 120
        time.sleep(0.1)
    os.kill(process.pid, stop)
    said, _ = process.communicate(timeout=60)
    first = next(tmp_path.glob("two/*/record.json"))
    before = first.stat().st_mtime_ns
    if stop != signal.SIGKILL:
        assert process.returncode == 128 + stop and "goes on from here" in said

    again = _call(*call)
    assert again.returncode == 0, again.stderr
    assert "done before" in again.stdout and first.stat().st_mtime_ns == before
    records, damaged = read_records(tmp_path / "two")
    assert len(records) == 2 and not damaged
    figures = tmp_path / "two" / "figures"
    assert {"results.md", "results.csv", "results.png", "results.svg"} <= {path.name for path in figures.iterdir()}

    unbroken = tmp_path / "unbroken"
    assert _call(*call[:-1], unbroken).returncode == 0
    for record in records:
        name = f"two/{record.spec.run_id}/predictions.jsonl"
        assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes()
    shutil.rmtree(unbroken)


# --- ranks ---


def test_spectra_of_a_models_folder_are_written_and_gone_on_with(tiny_base, tmp_path):
    call = ("spectra", "--model", tiny_base, "--out", tmp_path / "out.csv", "--target", "q_proj")
    first, again = _call(*call), _call(*call)
    assert first.returncode == again.returncode == 0
    assert "[2/2] model.layers.1.self_attn.q_proj: stable rank" in first.stdout and "[2/2]" not in again.stdout
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3


def test_spectra_need_a_folder():
    done = _call("spectra", "--model", "yahma/llama-7b-hf")
    assert done.returncode == 2 and "is no folder: fetch the model" in done.stderr


@pytest.mark.slow
def test_allocating_for_an_unknown_task_says_which_there_are(tmp_path):
    done = _call("allocate", tmp_path / "own.yaml", "--task", "nope")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown task 'nope': choose one of")
    assert len(done.stderr.splitlines()) == 1


def test_a_plan_for_what_is_no_model_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    done = _call("plan", "--model", tmp_path)
    assert done.returncode == 2 and f"error: {tmp_path / 'config.json'}: a configuration is a mapping" in done.stderr


@pytest.mark.slow
def test_allocating_ranks_writes_a_profile_whose_runs_can_be_made(tiny_profile, tmp_path):
    values = yaml.safe_load(tiny_profile.read_text()) | {"batch_size": 1}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values))
    done = _call("allocate", tmp_path / "own.yaml", "--profile", tmp_path / "base.yaml", "--rank", 3, "--task", "boolq")
    assert done.returncode == 2 and "60 batches of 1 need 60 training examples" in done.stderr
    done = _call("allocate", tmp_path / "own.yaml", "--profile", tmp_path / "base.yaml", "--rank", 3)
    assert done.returncode == 0, done.stderr
    own = load_profile(tmp_path / "own.yaml")
    assert {"stable-rank-3", "update-spectrum-3", "shuffled-3", "reversed-3"} <= own.variants.keys()
    assert own.tasks == values["tasks"] and own.methods == ["dora"]
