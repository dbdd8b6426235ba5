"""The learning rate of every method, chosen on validation data from one grid with the same number of trials."""

import csv
import multiprocessing
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from dora_lab.files import prepare_folder
from dora_lab.machine import runs_at_a_time
from dora_lab.profiles import Profile
from dora_lab.records import is_done, read_record, run_folder
from dora_lab.specs import RunSpec

SWEEP = "sweep.csv"
COLUMNS = ("task", "method", "rank", "learning_rate", "seed", "accuracy", "run_id")


def sweep_specs(profile: Profile, methods: list[str] | None = None) -> list[RunSpec]:
    """Every task x method x rate of the profile's one grid x sweep seed, scored on validation data."""
    return [
        RunSpec.from_profile(profile, task, method, seed=seed, learning_rate=rate, split="validation")
        for task in profile.tasks
        for method in (methods or sorted(profile.learning_rate))
        for rate in profile.learning_rate_grid
        for seed in profile.sweep_seeds
    ]


def run_sweep(
    specs: list[RunSpec],
    runs_dir: Path,
    jobs: int | None = None,
    report: Callable[[str], None] = print,
    recorded: Iterable[Mapping] = (),
) -> list[dict]:
    """Do the sweep's runs that are not done and write `<runs_dir>/<profile>/sweep.csv`; returns its rows.

    The runs are done in worker processes without papermill. A run that failed (a rate too high, say, or a GPU too
    small) has no accuracy in its row. A row of `recorded` with a spec's run id, and so with all of its settings, stands
    for that run. Ctrl-C keeps what is finished. Raises RuntimeError if a worker is killed; what is finished is kept.
    """
    before = {row["run_id"]: row["accuracy"] for row in recorded}
    waiting = [spec for spec in specs if spec.run_id not in before and not is_done(run_folder(runs_dir, spec))]
    report(f"{len(specs)} runs: {len(specs) - len(waiting)} done before, {len(waiting)} to do")
    jobs = jobs or runs_at_a_time(specs[0].threads)
    context = multiprocessing.get_context("spawn")
    began = time.monotonic()
    with ProcessPoolExecutor(jobs, context, _be_a_worker, (specs[0].threads,)) as pool:
        try:
            started = {pool.submit(_finetune_quietly, spec, runs_dir): spec for spec in waiting}
            for count, future in enumerate(as_completed(started), 1):
                spec, outcome = started[future], future.result()
                minutes = (time.monotonic() - began) / count * (len(waiting) - count) / 60
                report(
                    f"[{count}/{len(waiting)}] {spec.task} {spec.method} at {spec.learning_rate:g}, seed {spec.seed}: "
                    f"{outcome}; about {minutes:.0f} min left"
                )
        except BrokenProcessPool as error:
            raise RuntimeError(
                "the process of a run was killed, for want of memory perhaps: free some, or give fewer jobs"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    rows = []
    for spec in specs:
        folder = run_folder(runs_dir, spec)
        row = {name: getattr(spec, name) for name in COLUMNS if name != "accuracy"}
        accuracy = read_record(folder).result.accuracy if is_done(folder) else before.get(spec.run_id)
        rows.append(row | {"accuracy": accuracy})
    folder = runs_dir / specs[0].profile
    prepare_folder(folder)
    write_sweep(rows, folder / SWEEP)
    return rows


def write_sweep(rows: list[dict], path: Path) -> None:
    """Write the rows of a sweep as CSV, by rename."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read_sweep(path: Path) -> list[dict]:
    """Rows of a `sweep.csv`: task, method, rank, learning_rate, seed, accuracy (None for a failed run), run_id."""
    with Path(path).open(newline="") as file:
        return [
            {
                **row,
                "rank": int(row["rank"]) if row["rank"] else None,
                "learning_rate": float(row["learning_rate"]),
                "seed": int(row["seed"]),
                "accuracy": float(row["accuracy"]) if row["accuracy"] else None,
            }
            for row in csv.DictReader(file)
        ]


def best_rates(rows: Iterable[Mapping]) -> dict[tuple[str, str], float]:
    """(method, task) -> the rate of the best mean validation accuracy over seeds; ties go to the lower rate.

    A rate at which a run failed cannot be chosen. Raises ValueError if methods were not given the same trials on a
    task, or if no rate of a method is left.
    """
    found: dict[tuple[str, str], dict[float, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    trials: dict[tuple[str, str], set[tuple[float, int]]] = defaultdict(set)
    for row in rows:
        key = (row["method"], row["task"])
        found[key][row["learning_rate"]].append(row["accuracy"])
        trials[key].add((row["learning_rate"], row["seed"]))
    for (method, task), tried in trials.items():
        for (other, same_task), others in trials.items():
            if same_task == task and others != tried:
                raise ValueError(f"{method} and {other} were not given the same trials on {task}: run the whole sweep")
    chosen = {}
    for key, rates in found.items():
        means = {rate: sum(values) / len(values) for rate, values in rates.items() if None not in values}
        if not means:
            raise ValueError(f"every learning rate failed for {key[0]} on {key[1]}: give a grid with lower rates")
        chosen[key] = min(means, key=lambda rate: (-means[rate], rate))
    return chosen


def _be_a_worker(threads: int) -> None:
    """Set up a sweep's worker."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def _finetune_quietly(spec: RunSpec, runs_dir: Path) -> str:
    """Do one run of a sweep; returns its accuracy or its error as text."""
    from dora_lab.training import finetune

    try:
        record = finetune(spec, runs_dir, progress=False)
    except (ValueError, OSError, RuntimeError) as error:  # what `finetune` says that it raises
        return f"failed: {error}"
    for name in ("adapter", "model"):  # a sweep asks for a score only
        shutil.rmtree(run_folder(runs_dir, spec) / name, ignore_errors=True)
    return f"{record.result.accuracy:.3f}"
