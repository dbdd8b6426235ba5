"""One cell of the grid: the command that does it, and what that takes. Every engine starts cells from here."""

import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from dora_lab.preflight import is_large, plan_of
from dora_lab.profiles import PROJECT, Profile
from dora_lab.records import run_folder
from dora_lab.specs import PARAMETERS, RunSpec
from dora_lab.worker import WANTED

WORKER = PROJECT / "notebooks" / "07_fine_tune.ipynb"
LOG = "worker.log"
PROCESS_BYTES = 1_500_000_000  # of Python, PyTorch, the kernel and papermill; 0.8 GB were measured, evaluation included
# Sustained FLOP/s, on the slow side, which is assumed: a cell that is cut off goes on from its last checkpoint.
SPEED = {"gpu": 5e13, "thread": 5e9}
START_MINUTES = 10
EVALUATION = 1.5  # training and evaluation, in times of training


@dataclass(frozen=True)
class Needs:
    """What a scheduler is asked for."""

    threads: int
    memory_mb: int
    minutes: int
    gpus: int


def papermill(notebook: Path, output: Path, parameters: dict[str, object]) -> list[str]:
    """The command that runs a notebook headless; texts and paths are given as they are, numbers as numbers."""
    command = [sys.executable, "-m", "dora_lab.worker", "--no-progress-bar", "--cwd", str(PROJECT)]
    command += [str(notebook), str(output)]
    for name, value in parameters.items():
        command += ["-r" if isinstance(value, str | Path) else "-p", name, str(value)]
    return command


def cell_command(profile_name: str, spec: RunSpec, runs_dir: Path) -> list[str]:
    """The command of one cell: papermill on the worker notebook, into the run's folder."""
    values = {name: getattr(spec, name, None) for name in PARAMETERS}
    values |= {"profile": absolute(profile_name), "runs_dir": Path(runs_dir).resolve()}
    output = run_folder(runs_dir, spec) / "notebook.ipynb"
    return papermill(WORKER, output, {name: value for name, value in values.items() if value is not None})


def cell_environment(profile: Profile, spec: RunSpec) -> dict[str, str]:
    """What the command's environment has besides the caller's. The base and the data are in the cache by then."""
    return {
        "OMP_NUM_THREADS": str(spec.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        WANTED: str(gpus(profile, spec)),
    }


def shell_line(profile_name: str, profile: Profile, spec: RunSpec, runs_dir: Path) -> str:
    """Command and environment as one line for a shell in any folder of any machine that shares the file system."""
    environment = cell_environment(profile, spec)
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    named = ["env", *(f"{name}={value}" for name, value in environment.items())]
    return f"cd {shlex.quote(str(PROJECT))} && {shlex.join([*named, *cell_command(profile_name, spec, runs_dir)])}"


def needs(profile: Profile, spec: RunSpec) -> Needs:
    """Threads, memory of the machine (not the GPU), minutes and GPUs, from the planner.

    A GPU's cell has the weights in memory once for each of its processes, a CPU's the whole plan. Minutes are of the
    floating-point operations: 2 for a parameter and a token forward, 2 or, in full, 4 backward, 2 more where the
    forward is repeated; the start and the evaluation are allowed for.
    """
    planned, own = plan_of(spec), gpus(profile, spec)
    planned_bytes = 0 if planned is None else planned.weights if own else planned.total
    minutes = START_MINUTES
    if planned is not None:
        passes = 4 + 2 * (spec.method == "full") + 2 * spec.gradient_checkpointing
        tokens = spec.steps * spec.examples_per_step * planned.job.length
        speed = own * SPEED["gpu"] if own else profile.processes * spec.threads * SPEED["thread"]
        minutes += math.ceil(EVALUATION * passes * planned.job.shape.parameters * tokens / speed / 60)
    memory_mb = math.ceil(profile.processes * (planned_bytes + PROCESS_BYTES) / 1e6)
    return Needs(profile.processes * spec.threads, memory_mb, minutes, own)


def gpus(profile: Profile, spec: RunSpec) -> int:
    """One for each process of a run on a base that is large; a small one has no use for it."""
    return profile.processes if is_large(spec) else 0


def absolute(profile_name: str) -> str:
    """The profile's name, or the whole path of its file: a cell does not run where the command was given."""
    return str(Path(profile_name).resolve()) if str(profile_name).endswith((".yaml", ".yml")) else profile_name
