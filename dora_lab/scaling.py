"""How a grid grows with its workers: measured on this machine, and thought through for many GPUs.

A cell is its run and an overhead: papermill's and the kernel's start, PyTorch's import, the model's loading, the end.
"""

import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dora_lab import cluster, pipeline
from dora_lab.cells import needs
from dora_lab.job import FLOAT
from dora_lab.machine import processor
from dora_lab.preflight import plan_of
from dora_lab.profiles import load_profile
from dora_lab.records import RunSpec, read_record, run_folder

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
        "cores": os.cpu_count(),
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


def on_paper(cells: int = 1000, gpus: int = 64, gpus_a_node: int = 8, profile_name: str = "llama-7b") -> dict:
    """What a grid of `cells` DoRA runs, the profile's tasks in turn, comes to on so many GPUs; nothing is run.

    hours, and those of the longest cell, by the planner's speed, which is assumed; bytes of adapters that stay, and of
    checkpoints at a time; seconds in which every node reads the base once at the start.
    """
    profile = load_profile(profile_name)
    specs = [RunSpec.from_profile(profile, task, "dora") for task in profile.tasks]
    hours = [needs(profile, spec).minutes / 60 for spec in specs]
    planned = plan_of(specs[0])
    adapter = FLOAT * planned.job.trained
    return {
        "hours": cells * sum(hours) / len(hours) / gpus,
        "longest_hours": max(hours),
        "adapters_bytes": cells * adapter,
        "checkpoints_bytes": gpus * CHECKPOINTS * 3 * adapter,
        "start_s": gpus / gpus_a_node * planned.weights / STORE_BYTES_S,
    }


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
