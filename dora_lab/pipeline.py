"""The grid of runs through papermill: one process a run, resumable, failures named and not hidden."""

import multiprocessing
import os
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dora_lab.cells import LOG, absolute, cell_command, cell_environment, papermill
from dora_lab.children import Children
from dora_lab.data import fetch_data
from dora_lab.files import prepare_folder
from dora_lab.machine import runs_at_a_time
from dora_lab.preflight import check_base, check_memory, fetch_base, is_large
from dora_lab.profiles import PROJECT, Profile, load_profile
from dora_lab.records import (
    FAILURE,
    RunRecord,
    is_done,
    read_predictions,
    read_record,
    read_records,
    run_folder,
    write_failure,
)
from dora_lab.specs import LOW_RANK, RunSpec
from dora_lab.statistics import correct_by_id
from dora_lab.sweep import SWEEP
from dora_lab.tables import compared_with_recorded

RESULT_CHAPTERS = ("08_results", "09_update_geometry")
RECORDED = PROJECT / "data" / "results"
NEEDED_BYTES = 200 * 2**20  # free disk below which a grid is not started
KEPT = ("record.json", "predictions.jsonl", "curve.jsonl", "geometry.jsonl", FAILURE)


@dataclass
class Summary:
    """What a grid came to: runs done before, done now, and failed (run id -> last line of the error)."""

    total: int
    done_before: int = 0
    done_now: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def grid(
    profile: Profile,
    seeds: list[int] | None = None,
    methods: list[str] | None = None,
    ranks: list[int] | None = None,
    variants: list[str] | None = None,
) -> list[RunSpec]:
    """Every task x method x seed of the profile, or of the seeds and methods given; seeds vary slowest.

    `ranks`: LoRA and DoRA at each of these ranks instead of at the profile's. `variants`: these alone, instead of the
    plain runs and all variants of the profile.
    """
    return [
        RunSpec.from_profile(profile, task, method, rank, seed, variant=variant)
        for seed in (seeds or profile.seeds)
        for task in profile.tasks
        for method in (methods or profile.methods)
        for rank in ((ranks or [None]) if method in LOW_RANK else [None])
        for variant in (variants or [None, *profile.variants])
    ]


def of_profile(profile: Profile, records: Iterable[RunRecord]) -> list[RunRecord]:
    """The records that `profile` would give now: its rates, steps, data and base; any method, rank, seed and variant.

    Others in the same folder (another learning rate, an older base, a validation score) are other experiments.
    """
    kept = []
    for record in records:
        spec = record.spec
        if spec.variant is not None and spec.variant not in profile.variants:
            continue
        if spec.task in profile.tasks and spec.task in profile.learning_rate.get(spec.method, {}):
            again = RunSpec.from_profile(profile, spec.task, spec.method, spec.rank, spec.seed, variant=spec.variant)
            if spec.run_id == again.run_id:
                kept.append(record)
    return kept


def answers_of(
    runs_dir: Path, records: Iterable[RunRecord], name: Callable[[RunSpec], str] | None = None
) -> dict[tuple[str, str], dict[int, dict[str, bool]]]:
    """(task, name) -> seed -> {example id: answered right}, for paired comparisons.

    The name of a run is its variant, or its method, unless `name` says otherwise: give records of one rank then.
    """
    answers: dict[tuple[str, str], dict[int, dict[str, bool]]] = defaultdict(dict)
    for record in records:
        rows = read_predictions(run_folder(runs_dir, record.spec))
        called = name(record.spec) if name else record.spec.variant or record.spec.method
        answers[record.spec.task, called][record.spec.seed] = correct_by_id(rows)
    return answers


class Progress:
    """Counts a grid's runs as they end, says so in a line each, and ends as a `Summary`."""

    def __init__(self, specs: list[RunSpec], runs_dir: Path, report: Callable[[str], None]):
        self.summary = Summary(len(specs))
        self.runs_dir, self.report = runs_dir, report
        self.waiting = [spec for spec in specs if not is_done(run_folder(runs_dir, spec))]
        self.summary.done_before = len(specs) - len(self.waiting)
        for spec in specs:
            if spec not in self.waiting:
                read_record(run_folder(runs_dir, spec))  # a damaged record is told now, not after an hour
        self.began = time.monotonic()

    def begin(self, how: str) -> None:
        s = self.summary
        self.report(f"{s.total} runs: {s.done_before} done before, {len(self.waiting)} to do, {how}")

    def ended(self, spec: RunSpec, error: str | None) -> None:
        """Count a run that is done, or that failed with `error`."""
        s = self.summary
        if error is None:
            s.done_now += 1
            s.failed.pop(spec.run_id, None)  # a second try did it
        else:
            s.failed[spec.run_id] = error
        count = s.done_now + len(s.failed)
        left = s.total - s.done_before - count
        minutes = (time.monotonic() - self.began) / count * left / 60
        outcome = "failed" if error else f"{read_record(run_folder(self.runs_dir, spec)).result.accuracy:.3f}"
        self.report(
            f"[{s.done_before + count}/{s.total}] {spec.run_id}: {outcome}; {left} left, about {minutes:.0f} min"
        )


def run_grid(
    profile_name: str,
    specs: list[RunSpec],
    runs_dir: Path,
    jobs: int | None = None,
    report: Callable[[str], None] = print,
) -> Summary:
    """Do the runs that are not done, `jobs` at a time, each in a papermill process of its own.

    A failed run is noted in its folder and the rest goes on. Ctrl-C, SIGTERM and SIGHUP, and any error, end the
    running processes and are raised (a signal as KeyboardInterrupt); what is finished stays, what was running goes on
    from its last checkpoint next time.
    `profile_name` is the name or path that the worker notebook is given.
    """
    profile = load_profile(profile_name)
    jobs = jobs or profile.jobs or runs_at_a_time(specs[0].threads * profile.processes)
    progress = Progress(specs, runs_dir, report)
    progress.begin(f"{jobs} at a time")
    waiting = list(progress.waiting)
    running: dict[subprocess.Popen, RunSpec] = {}
    with Children() as children:
        while waiting or running:
            while waiting and len(running) < jobs:
                spec = waiting.pop(0)
                running[_start(children, profile_name, profile, spec, runs_dir)] = spec
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                spec = running.pop(process)
                progress.ended(spec, failure(spec, runs_dir, f"exit code {process.returncode}"))
    return progress.summary


def failure(spec: RunSpec, runs_dir: Path, ending: str) -> str | None:
    """None if the run is done, else the last line of what its process said, and how it ended; noted in its folder."""
    folder = run_folder(runs_dir, spec)
    if is_done(folder):
        return None
    log = folder / LOG
    said = last_line(log.read_text(errors="replace")) if log.is_file() else "it was not started"
    error = f"{said} ({ending}; see {log})"
    write_failure(folder, spec, error)
    return error


def result_chapters(profile_name: str, profile: Profile, runs_dir: Path) -> dict[str, tuple[Path, dict[str, str]]]:
    """{chapter: (the notebook that it is run into, its parameters)} that draw the table and figures of what is done."""
    folder = runs_dir.resolve() / profile.name
    parameters = {"profile": absolute(profile_name), "runs_dir": str(runs_dir.resolve())}
    parameters["figures_dir"] = str(folder / "figures")
    return {name: (folder / f"{name}.ipynb", parameters) for name in RESULT_CHAPTERS}


def draw_results(profile_name: str, profile: Profile, runs_dir: Path) -> None:
    """Write the table and figures to `<runs_dir>/<profile>/figures`. Raises RuntimeError if a chapter fails."""
    for name, (output, parameters) in result_chapters(profile_name, profile, runs_dir).items():
        run_chapter(name, output, **parameters)


def run_chapter(name: str, output: Path, **parameters: str) -> None:
    """Run a chapter headless. Raises ValueError for a parameter the chapter does not have, RuntimeError if it fails."""
    from papermill import inspect_notebook

    known = inspect_notebook(str(chapter(name)))
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"{name} has no parameter {parameter!r}: it has {', '.join(known)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with Children() as children:
        process = children.start(
            papermill(chapter(name), output, parameters), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"chapter {name} failed: {last_line(said)}; see {output}")


def record_results(profile: Profile, runs_dir: Path, target: Path | None = None) -> int:
    """Copy the profile's finished runs to `data/results/<profile>`, without adapters and checkpoints; says how many.

    The sweep's table goes along. What was recorded before of other settings is taken away: a record that the profile
    no longer gives would stand beside new ones as if it belonged to them.
    """
    target = target or RECORDED / profile.name
    source = Path(runs_dir) / profile.name
    records, damaged = read_records(source)
    if damaged:
        raise ValueError(damaged[0])
    current = of_profile(profile, records)
    if not current:
        raise ValueError(f"{source} has no finished run of profile {profile.name}: run `dora-lab reproduce` first")
    earlier, _ = read_records(target)
    kept = {record.spec.run_id for record in of_profile(profile, earlier)}
    for path in target.glob("*/record.json"):
        if path.parent.name not in kept:
            shutil.rmtree(path.parent)
    if (source / SWEEP).exists():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / SWEEP, target / SWEEP)
    for record in current:
        path = run_folder(runs_dir, record.spec) / "record.json"
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (path.parent / name).exists():
                shutil.copy2(path.parent / name, target / path.parent.name / name)
    return len(current)


def against_recorded(profile: Profile, specs: list[RunSpec], runs_dir: Path) -> list[str]:
    """How the finished runs among `specs` stand to those recorded under `data/results`, in lines to print."""
    recorded = of_profile(profile, read_records(RECORDED / profile.name)[0])
    if not recorded:
        return [f"no results of profile {profile.name} with these settings are recorded: nothing to compare with"]
    folders = [run_folder(runs_dir, spec) for spec in specs]
    live = [read_record(folder) for folder in folders if is_done(folder)]
    return ["Compared with the recorded results:", *compared_with_recorded(live, recorded)]


def preflight(runs_dir: Path, specs: Iterable[RunSpec] = (), here: bool = True) -> None:
    """See that results can be written and that the runs' bases can be had and fit; fetch base and data once for all.

    here: whether the runs are done on this machine, so that they have to fit on it; another checks that for itself.
    Raises OSError, FileNotFoundError or ValueError saying what to do. The GPU is looked at by a process that ends, so
    that nothing of it is held.
    """
    prepare_folder(Path(runs_dir))
    free = shutil.disk_usage(runs_dir).free
    if free < NEEDED_BYTES:
        raise OSError(f"only {free // 2**20} MiB free at {runs_dir}, {NEEDED_BYTES // 2**20} needed: free some space")
    bases = {(spec.base_model, spec.revision, spec.tokenizer): spec for spec in specs}
    for spec in bases.values():
        check_base(spec)
    large = {spec.method: spec for spec in specs if here and is_large(spec)}
    if large:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            for spec in large.values():
                pool.submit(check_memory, spec).result()
    for spec in bases.values():
        fetch_base(spec)
    for source, task in dict.fromkeys((spec.data, spec.task) for spec in specs):
        fetch_data(source, task)


def _start(children: Children, profile_name: str, profile: Profile, spec: RunSpec, runs_dir: Path) -> subprocess.Popen:
    folder = run_folder(runs_dir, spec)
    prepare_folder(folder)
    with (folder / LOG).open("w") as log:
        return children.start(
            cell_command(profile_name, spec, runs_dir),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | cell_environment(profile, spec),
        )


def chapter(name: str) -> Path:
    """The notebook of a chapter."""
    return PROJECT / "notebooks" / f"{name}.ipynb"


def last_line(text: str) -> str:
    """The last line with something in it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")
