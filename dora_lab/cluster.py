"""The grid through Snakemake: the same cells, records and report, on this machine or through a cluster's scheduler.

Snakemake lives in an environment of its own (`make snakemake`); a cell runs in the project's. Snakemake is given a file
with every cell's command and what that takes; `workflow/Snakefile` makes rules of it.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from dora_lab.cells import LOG, needs, papermill, shell_line
from dora_lab.children import Children
from dora_lab.files import prepare_folder, write_text
from dora_lab.machine import detect, runs_at_a_time
from dora_lab.pipeline import Progress, Summary, chapter, failure, last_line, result_chapters
from dora_lab.profiles import PROJECT, Profile, load_profile
from dora_lab.records import FAILURE, is_done, run_folder
from dora_lab.specs import RunSpec

WORKFLOW = Path(__file__).parent / "workflow"
PROFILES = WORKFLOW / "profiles"
ENGINE_LOG = "snakemake.log"
POLL_S = 0.5
STOP_S = 120.0  # for Snakemake to cancel what it has submitted


def find_snakemake() -> str:
    """The command: of `make snakemake`'s environment, or on the PATH. Raises RuntimeError if there is none."""
    own = PROJECT / ".venv-snakemake" / "bin" / "snakemake"
    found = str(own) if own.is_file() else shutil.which("snakemake")
    if found is None:
        raise RuntimeError("Snakemake is not installed: `make snakemake` sets it up in an environment of its own")
    return found


def find_profile(name_or_folder: str) -> Path:
    """The folder of a Snakemake profile that ships, or of another. Raises ValueError if it has no config.yaml."""
    folder = PROFILES / name_or_folder if (PROFILES / name_or_folder).is_dir() else Path(name_or_folder).resolve()
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"unknown Snakemake profile {name_or_folder!r}: choose one of "
            f"{', '.join(sorted(path.name for path in PROFILES.iterdir()))}, or give a folder with a config.yaml"
        )
    return folder


def write_grid(profile_name: str, profile: Profile, specs: list[RunSpec], runs_dir: Path) -> Path:
    """Write what the Snakefile reads, under a name of its own: commands of two grids do not meet."""
    cells = {}
    for spec in specs:
        wanted = needs(profile, spec)
        cells[spec.run_id] = vars(wanted) | {"command": shell_line(profile_name, profile, spec, runs_dir)}
    results = [
        shlex.join(papermill(chapter(name), output, parameters))
        for name, (output, parameters) in result_chapters(profile_name, profile, runs_dir).items()
    ]
    text = json.dumps({"log": LOG, "cells": cells, "results": " && ".join(results)}, indent=1)
    path = runs_dir / profile.name / ".snakemake" / f"grid-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def run_grid(
    profile_name: str,
    specs: list[RunSpec],
    runs_dir: Path,
    jobs: int | None = None,
    report: Callable[[str], None] = print,
    snakemake_profile: str = "local",
) -> Summary:
    """As `pipeline.run_grid`, by Snakemake. `snakemake_profile`: local, slurm, or a folder with a config.yaml.

    A failed cell is reported when it has noted why; one that was killed could not, and is when Snakemake has ended.
    What stops this stops Snakemake. Raises RuntimeError if Snakemake is missing or ends before any cell was tried.
    """
    profile, folder = load_profile(profile_name), find_profile(snakemake_profile)
    progress = Progress(specs, runs_dir, report)
    progress.begin(f"by Snakemake with profile {folder.name}")
    if not progress.waiting:
        return progress.summary
    for spec in progress.waiting:
        prepare_folder(run_folder(runs_dir, spec))
    grid = write_grid(profile_name, profile, specs, runs_dir)
    before = {spec.run_id: _changes(run_folder(runs_dir, spec)) for spec in progress.waiting}
    log = runs_dir / profile.name / ENGINE_LOG
    command = _command(grid, folder, _limits(folder, profile, specs[0], jobs), "grid")
    with log.open("w") as said, Children(_stop, STOP_S) as children:
        process = children.start(command, stdout=said, stderr=subprocess.STDOUT)
        waiting = progress.waiting
        while process.poll() is None:
            time.sleep(POLL_S)
            waiting = [spec for spec in waiting if not _has_ended(progress, spec, before[spec.run_id])]
    text = log.read_text(errors="replace")
    if process.returncode and not any(_changes(run_folder(runs_dir, s)) != before[s.run_id] for s in progress.waiting):
        raise RuntimeError(f"Snakemake could not run the grid: {last_line(text)}; see {log}")
    for spec in progress.waiting:
        if is_done(run_folder(runs_dir, spec)):
            if spec in waiting:
                progress.ended(spec, None)
        elif spec.run_id not in progress.summary.failed:
            progress.ended(spec, failure(spec, runs_dir, _ending(text, spec)))
    return progress.summary


def draw_results(profile_name: str, profile: Profile, specs: list[RunSpec], runs_dir: Path) -> None:
    """As `pipeline.draw_results`, by Snakemake's rule, on this machine. Raises RuntimeError if a chapter fails."""
    grid = write_grid(profile_name, profile, specs, runs_dir)
    log = runs_dir / profile.name / "results.log"
    command = _command(grid, PROFILES / "local", ["--cores=1", "--forcerun=results"], "results")
    with log.open("w") as said, Children(_stop, STOP_S) as children:
        process = children.start(command, stdout=said, stderr=subprocess.STDOUT)
        process.wait()
    if process.returncode:
        raise RuntimeError(f"the table and figures could not be drawn; see {log}")


def _command(grid: Path, folder: Path, options: list[str], target: str) -> list[str]:
    command = [find_snakemake(), "--config", f"grid={grid}", f"--snakefile={WORKFLOW / 'Snakefile'}"]
    return command + [f"--directory={grid.parents[1]}", f"--profile={folder}", *options, "--", target]


def _stop(process: subprocess.Popen) -> None:
    """Ask Snakemake to end, which cancels what it has submitted, and with it the workers that it has started here."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def _limits(folder: Path, profile: Profile, spec: RunSpec, jobs: int | None) -> list[str]:
    """How much may run at a time: on this machine by its cores and GPUs, elsewhere by the number of jobs."""
    if yaml.safe_load((folder / "config.yaml").read_text()).get("executor", "local") != "local":
        return [f"--jobs={jobs}"] if jobs else []
    gpus, threads = detect().gpus, spec.threads * profile.processes
    jobs = jobs or profile.jobs or runs_at_a_time(threads)
    return [f"--cores={jobs * threads}"] + ([f"--resources=gpu={len(gpus)}"] if gpus else [])


def _changes(folder: Path) -> list[int]:
    """When the traces that a cell leaves were last written."""
    paths = [folder / name for name in ("record.json", FAILURE, LOG)]
    return [path.stat().st_mtime_ns if path.is_file() else 0 for path in paths]


def _has_ended(progress: Progress, spec: RunSpec, before: list[int]) -> bool:
    """Whether the run is done, which is said; a failure that it has newly noted is said too, and may be tried again."""
    folder = run_folder(progress.runs_dir, spec)
    if is_done(folder):
        progress.ended(spec, None)
        return True
    if spec.run_id not in progress.summary.failed and _changes(folder)[1] != before[1]:
        with contextlib.suppress(FileNotFoundError):  # a run that is done this moment takes its old note away
            progress.ended(spec, json.loads((folder / FAILURE).read_text())["error"])
    return False


def _ending(log: str, spec: RunSpec) -> str:
    """How a cell ended that could not say so itself: the scheduler's word for it, as Snakemake passes it on."""
    for block in re.findall(r"^Error in rule cell.*?(?=^\S|\Z)", log, re.MULTILINE | re.DOTALL):
        found = re.search(r"SLURM status is: '(\w+)'", block)
        if f"{spec.run_id}/" in block and found:
            return f"Slurm says {found[1]}"
    return "it was killed or failed before it could note why"
