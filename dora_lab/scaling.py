"""How a grid grows with its workers: measured on this machine, and thought through for many GPUs.

A cell is its run and an overhead: papermill's and the kernel's start, PyTorch's import, the model's loading, the end.
"""

import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dora_lab import cluster, pipeline
from dora_lab.cells import SPEED, needs
from dora_lab.job import FLOAT
from dora_lab.machine import cores, processor
from dora_lab.preflight import plan_of
from dora_lab.profiles import load_profile
from dora_lab.records import read_record, run_folder
from dora_lab.specs import RunSpec

CHECKPOINTS = 2  # kept of a run that goes on: what is trained and the optimizer's two numbers for each
STORE_BYTES_S = 5e9  # of a shared file system, which is assumed


def measure(
    profile_name: str = "smoke",
    settings: Sequence[tuple[str, int]] = (("local", 1), ("local", 2), ("snakemake", 2)),
    report: Callable[[str], None] = print,
) -> dict:
    """Do the profile's grid anew with each (engine, workers); seconds of the wall clock and of the processors.

    run_s: training and evaluation of a cell, as its record says. busy: others' load on this machine when it began,
    which lengthens the wall's seconds and not the processors'.
    """
    specs = pipeline.grid(load_profile(profile_name))
    rows = []
    for engine, workers in settings:
        report(f"{len(specs)} cells, {workers} at a time, {engine}")
        with tempfile.TemporaryDirectory() as folder:
            busy, cpu, began = os.getloadavg()[0], _children_s(), time.monotonic()
            run = pipeline.run_grid if engine == "local" else cluster.run_grid
            summary = run(profile_name, specs, Path(folder), workers, report)
            wall_s, cpu_s = time.monotonic() - began, _children_s() - cpu
            if summary.failed:
                raise RuntimeError(f"a run failed, nothing was measured: {next(iter(summary.failed.values()))}")
            results = [read_record(run_folder(folder, spec)).result for spec in specs]
        run_s = sum(result.train_time_s + result.evaluation_time_s for result in results) / len(specs)
        row = {"engine": engine, "workers": workers, "busy": round(busy, 1), "wall_s": wall_s, "cpu_s": cpu_s}
        rows.append(row | {"run_s": run_s})
    return {
        "profile": profile_name,
        "cells": len(specs),
        "device": processor(),
        "cores": cores(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "rows": rows,
    }


def table(measured: dict) -> list[list[str]]:
    """Rows of the README's table: engine, workers, cells an hour, and seconds of a cell beside its run.

    The wall's are of a worker. A run has one thread, so that its time is at least the processors' too.
    """
    cells = measured["cells"]
    return [
        [
            row["engine"],
            str(row["workers"]),
            f"{3600 * cells / row['wall_s']:.0f}",
            f"{row['run_s']:.1f}",
            f"{row['wall_s'] * row['workers'] / cells - row['run_s']:.1f}",
            f"{row['cpu_s'] / cells:.1f}",
            f"{row['busy']:.1f}",
        ]
        for row in measured["rows"]
    ]


def on_paper(cells: int = 1000, gpus: int = 64, gpus_a_node: int = 8) -> list[str]:
    """What `cells` runs of DoRA on LLaMA-7B, the profile's tasks in turn, come to on so many GPUs; nothing is run.

    Hours by the planner's speed and minutes by the file system's, both of which are assumed.
    """
    profile = replace(load_profile("llama-7b"), base_model="random:llama-7b", tokenizer="mini-world")
    specs = {task: RunSpec.from_profile(profile, task, "dora") for task in profile.tasks}
    hours = {task: needs(profile, spec).minutes / 60 for task, spec in specs.items()}
    planned = plan_of(specs[profile.tasks[0]])
    adapter, longest = FLOAT * planned.job.trained, max(hours, key=hours.get)
    spread = ", ".join(f"{task} {hours[task]:.1f}" for task in hours)
    start_s = gpus / gpus_a_node * planned.weights / STORE_BYTES_S
    return [
        f"- GPUs: {spread} hours a cell at an assumed {SPEED['gpu'] / 1e12:.0f} TFLOP/s, so "
        f"{cells * sum(hours.values()) / len(hours) / gpus:.0f} hours in all: the bottleneck. Seconds of overhead "
        "do not show.",
        f"- Last hours: a cell of {longest} that starts last keeps one GPU busy for up to {hours[longest]:.1f} hours "
        "while the others wait.",
        f"- Disk: {cells} adapters of {adapter / 1e6:.0f} MB are {cells * adapter / 1e9:.0f} GB, checkpoints at most "
        f"{gpus * CHECKPOINTS * 3 * adapter / 1e9:.0f} GB more at a time.",
        f"- Start: {gpus // gpus_a_node} nodes read {planned.weights / 1e9:.1f} GB each at once, "
        f"{start_s:.0f} s at an assumed {STORE_BYTES_S / 1e9:.0f} GB/s; afterwards cells start apart.",
    ]


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
