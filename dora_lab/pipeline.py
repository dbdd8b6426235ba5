"""The grid of runs through papermill: one process a run, resumable, failures named and not hidden."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dora_lab.profiles import PROJECT, Profile
from dora_lab.records import (
    RunSpec,
    is_done,
    locked,
    prepare_folder,
    read_record,
    run_folder,
    write_failure,
)

WORKER = PROJECT / "notebooks" / "07_fine_tune.ipynb"
RESULT_CHAPTERS = ("08_results", "09_update_geometry")
RECORDED = PROJECT / "data" / "results"
NEEDED_BYTES = 200 * 2**20  # free disk below which a grid is not started
KEPT = ("record.json", "predictions.jsonl", "curve.jsonl", "geometry.jsonl", "failure.json")


@dataclass
class Summary:
    """What a grid came to: runs done before, done now, and failed (run id -> last line of the error)."""

    total: int
    done_before: int = 0
    done_now: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def grid(profile: Profile, seeds: list[int] | None = None, methods: list[str] | None = None) -> list[RunSpec]:
    """Every task x method x seed of the profile, or of the seeds and methods given; seeds vary slowest."""
    return [
        RunSpec.from_profile(profile, task, method, seed=seed)
        for seed in (profile.seeds if seeds is None else seeds)
        for task in profile.tasks
        for method in (profile.methods if methods is None else methods)
    ]


def run_grid(
    profile_name: str,
    specs: list[RunSpec],
    runs_dir: Path,
    jobs: int | None = None,
    report: Callable[[str], None] = print,
) -> Summary:
    """Do the runs that are not done, `jobs` at a time, each in a papermill process of its own.

    A failed run is noted in its folder and the rest goes on. Ctrl-C ends the running processes and raises
    KeyboardInterrupt; what is finished stays, what was running goes on from its last checkpoint next time.
    `profile_name` is the name or path that the worker notebook is given.
    """
    jobs = jobs or max(1, (os.cpu_count() or 1) // specs[0].threads)
    summary = Summary(len(specs))
    waiting = [spec for spec in specs if not is_done(run_folder(runs_dir, spec))]
    summary.done_before = len(specs) - len(waiting)
    for spec in specs:
        if spec not in waiting:
            read_record(run_folder(runs_dir, spec))  # a damaged record is told now, not after an hour
    running: dict[subprocess.Popen, RunSpec] = {}
    began = time.monotonic()
    report(f"{len(specs)} runs: {summary.done_before} done before, {len(waiting)} to do, {jobs} at a time")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                spec = waiting.pop(0)
                running[_start(profile_name, spec, runs_dir)] = spec
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                spec = running.pop(process)
                error = _error(process, spec, runs_dir)
                if error is None:
                    summary.done_now += 1
                else:
                    summary.failed[spec.run_id] = error
                ended = summary.done_now + len(summary.failed)
                left = len(waiting) + len(running)
                minutes = (time.monotonic() - began) / ended * left / 60
                outcome = "failed" if error else f"{read_record(run_folder(runs_dir, spec)).result.accuracy:.3f}"
                report(
                    f"[{summary.done_before + ended}/{len(specs)}] {spec.run_id}: {outcome}; "
                    f"{left} left, about {minutes:.0f} min"
                )
    except KeyboardInterrupt:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(timeout=30)
        raise
    return summary


def run_chapter(name: str, output: Path, **parameters: str) -> None:
    """Run a chapter headless. Raises ValueError for a parameter the chapter does not have, RuntimeError if it fails."""
    import papermill

    notebook = PROJECT / "notebooks" / f"{name}.ipynb"
    known = papermill.inspect_notebook(str(notebook))
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"{name} has no parameter {parameter!r}: it has {', '.join(known)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(output)]
    for parameter, value in parameters.items():
        command += ["-r", parameter, str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"chapter {name} failed: {_last_line(done.stderr)}; see {output}")


def record_results(profile: Profile, runs_dir: Path, target: Path | None = None) -> int:
    """Copy finished runs without adapters and checkpoints to `data/results/<profile>`; returns how many."""
    target = target or RECORDED / profile.name
    count = 0
    for path in sorted((Path(runs_dir) / profile.name).glob("*/record.json")):
        read_record(path.parent)
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (path.parent / name).exists():
                shutil.copy2(path.parent / name, target / path.parent.name / name)
        count += 1
    return count


def preflight(runs_dir: Path) -> None:
    """See that results can be written before anything is run. Raises OSError saying what to do."""
    prepare_folder(Path(runs_dir))
    free = shutil.disk_usage(runs_dir).free
    if free < NEEDED_BYTES:
        raise OSError(f"only {free // 2**20} MiB free at {runs_dir}, {NEEDED_BYTES // 2**20} needed: free some space")


def _start(profile_name: str, spec: RunSpec, runs_dir: Path) -> subprocess.Popen:
    folder = run_folder(runs_dir, spec)
    prepare_folder(folder)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(WORKER), str(folder / "notebook.ipynb")]
    values = {"profile": profile_name, "task": spec.task, "method": spec.method, "runs_dir": runs_dir.resolve()}
    for name, value in values.items():
        command += ["-r", name, str(value)]
    numbers = {"seed": spec.seed, "rank": spec.rank, "learning_rate": spec.learning_rate, "steps": spec.steps}
    for name, value in numbers.items():
        if value is not None:
            command += ["-p", name, str(value)]
    command += ["-r", "split", spec.split]
    environment = os.environ | {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
    log = (folder / "worker.log").open("w")
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=PROJECT, start_new_session=True
    )


def _error(process: subprocess.Popen, spec: RunSpec, runs_dir: Path) -> str | None:
    """None if the run is done, else the last line of what its process said; noted in the run's folder."""
    folder = run_folder(runs_dir, spec)
    if is_done(folder):
        return None
    said = _last_line((folder / "worker.log").read_text(errors="replace"))
    error = f"{said} (exit code {process.returncode}; see {folder / 'worker.log'})"
    with locked(folder):
        write_failure(folder, spec, error)
    return error


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")
