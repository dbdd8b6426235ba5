"""One run by as many processes as its profile says: this one, or several that accelerate starts (DDP or FSDP)."""

import atexit
import gc
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_lab.profiles import Profile, load_profile
from dora_lab.records import RunRecord, is_done, read_record, run_folder
from dora_lab.specs import PARAMETERS, RunSpec
from dora_lab.worker import WANTED

# Of FSDP2: every decoder layer is spread over the processes by itself.
FSDP = ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"]


def launch_command(profile: Profile, parameters: Mapping[str, Any]) -> list[str]:
    """`accelerate launch` of `dora_lab.training` on this machine; parameters: those of notebook 07 that are given."""
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={profile.processes}"]
    command += FSDP if profile.sharding == "fsdp" else ["--multi_gpu"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += ["-m", "dora_lab.training"]
    return command + [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]


def fine_tune(namespace: Mapping[str, Any], spec: RunSpec, runs_dir: Path) -> RunRecord:
    """The record of the run that notebook 07's variables ask for, done now unless it is done.

    Raises what `finetune` raises; of several processes RuntimeError, with the last that they said.
    """
    if WANTED in os.environ:
        _spare_seconds(spec)
    profile, folder = load_profile(namespace["profile"]), run_folder(runs_dir, spec)
    if profile.processes == 1 or is_done(folder):
        from dora_lab.training import finetune

        return finetune(spec, runs_dir, progress=False)
    given = {name: namespace[name] for name in PARAMETERS if namespace.get(name) not in (None, "")}
    done = subprocess.run(
        launch_command(profile, given | {"runs_dir": runs_dir}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode or not is_done(folder):
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise RuntimeError(f"{profile.processes} processes could not do the run: {(said or [done.stderr[-2000:]])[-1]}")
    return read_record(folder)


def _spare_seconds(spec: RunSpec) -> None:
    """In a kernel that a grid has started for this one run, leave out what takes seconds and the run has no use for."""
    if spec.quantisation == "none" and spec.optimizer == "adamw":
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # PEFT imports it where it is installed
    atexit.register(gc.freeze)  # at exit, the search for cycles through all that PyTorch has loaded
