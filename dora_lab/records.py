"""What a run gave (`RunRecord`), and the store: one folder a run.

`<runs>/<profile>/<run id>/` holds `predictions.jsonl`, `curve.jsonl`, `geometry.jsonl`, `adapter/` and `record.json`.
`record.json` is written last, by rename: a folder with one is done, a folder without one is taken up again.
"""

import dataclasses
import json
import platform
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dora_lab.files import read_lines, write_text
from dora_lab.machine import processor
from dora_lab.profiles import explain
from dora_lab.specs import RunSpec

FAILURE = "failure.json"
LIVE_CURVE = "curve.partial.jsonl"  # of a run that goes on; `curve.jsonl` takes its place at the end
_CONFIG = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CONFIG)
class RunResult:
    """What one run measured. Accuracies and rates are fractions; times in seconds, memory in bytes."""

    accuracy: float
    n: int
    correct: int
    chance: float
    unparsed_rate: float
    trainable_parameters: int
    total_parameters: int
    train_loss: float
    train_time_s: float
    step_time_s: float
    evaluation_time_s: float
    peak_memory_bytes: int
    resumed: bool
    shortened_prompts: int = 0  # training examples that lost their beginning or end to cutoff_tokens or answers_cut
    accuracy_per_token: float | None = None  # by length-normalised likelihood; None where the answers were generated
    accuracy_by_task: dict[str, float] | None = None  # of a mixture; the paper's average is their unweighted mean
    micro_batch_size: int | None = None  # examples read at a time, over all processes
    base_revision: str | None = None  # commit of a base from the hub
    processes: int = 1
    chosen_step: int | None = None  # after which the checkpoint was taken that best_of_checkpoints chose


@dataclass(frozen=True, config=_CONFIG)
class RunRecord:
    """One finished run."""

    spec: RunSpec
    result: RunResult
    environment: dict[str, Any]


def run_folder(runs_dir: str | Path, spec: RunSpec) -> Path:
    """`<runs_dir>/<profile>/<run id>`."""
    return Path(runs_dir) / spec.profile / spec.run_id


def read_predictions(folder: Path) -> list[dict]:
    """The run's answers: id, gold, prediction, log_likelihoods {candidate: log p}, parsed.

    Where a candidate has several tokens also log_likelihoods_per_token; where the answer was generated also its text.
    """
    return read_lines(Path(folder) / "predictions.jsonl")


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `record.json`, which makes the run done, and take away the trace of an earlier failure."""
    write_text(folder / "record.json", json.dumps(dataclasses.asdict(record), indent=1) + "\n")
    (folder / FAILURE).unlink(missing_ok=True)


def is_done(folder: Path) -> bool:
    """Whether the run in this folder is finished."""
    return (folder / "record.json").is_file()


def read_record(folder: Path) -> RunRecord:
    """The record of a finished run. Raises ValueError if it is damaged, saying which folder to delete."""
    path = folder / "record.json"
    try:
        return TypeAdapter(RunRecord).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        what = explain(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{path} is damaged ({what:.200}): delete the folder {folder} and run again") from error


def read_records(profile_folder: Path) -> tuple[list[RunRecord], list[str]]:
    """(records sorted by task, method, variant, rank and seed; one message for every damaged record)."""
    records, damaged = [], []
    for path in sorted(Path(profile_folder).glob("*/record.json")):
        try:
            records.append(read_record(path.parent))
        except ValueError as error:
            damaged.append(str(error))
    records.sort(
        key=lambda r: (
            r.spec.task,
            r.spec.method,
            r.spec.variant or "",
            r.spec.rank or 0,
            r.spec.seed,
            r.spec.learning_rate,
        )
    )
    return records, damaged


def remove_repeats(profile_folder: Path, others: Iterable[Path]) -> list[RunSpec]:
    """Take away the finished runs that one of the folders `others` has too, under other names; says which they were.

    Of a profile that extends another, the plain runs are such: all but the names of profile and variant is the same.
    """

    def identity(record: RunRecord) -> str:
        return dataclasses.replace(record.spec, variant=None).run_id

    known = {identity(record) for other in others if other != profile_folder for record in read_records(other)[0]}
    repeated = [record.spec for record in read_records(profile_folder)[0] if identity(record) in known]
    for spec in repeated:
        shutil.rmtree(profile_folder / spec.run_id)
    return repeated


def made_on(records: Iterable[RunRecord]) -> str:
    """How many runs, on which days (UTC), on what, with which versions: what stands beside a figure of them."""
    known = [record.environment for record in records]
    if not known:
        return "no runs"
    days = sorted({one["date"][:10] for one in known})
    found = {f"torch {one['versions']['torch']}, transformers {one['versions']['transformers']}" for one in known}
    parts = [" to ".join(dict.fromkeys((days[0], days[-1]))), *sorted({one["device"] for one in known}), *sorted(found)]
    return f"{len(known)} run{'s' * (len(known) > 1)}, {', '.join(parts)}"


def write_failure(folder: Path, spec: RunSpec, error: str) -> None:
    """Note why a run failed, for the tables; removed when the run succeeds."""
    failure = {name: getattr(spec, name) for name in ("task", "method", "rank", "variant", "seed")} | {"error": error}
    write_text(folder / FAILURE, json.dumps(failure, indent=1) + "\n")


def read_failures(profile_folder: Path) -> list[dict]:
    """Failed and not since finished runs: task, method, rank, variant, seed, error, folder."""
    paths = sorted(Path(profile_folder).glob(f"*/{FAILURE}"))
    return [json.loads(path.read_text()) | {"folder": str(path.parent)} for path in paths if not is_done(path.parent)]


def environment(threads: int) -> dict[str, Any]:
    """What the run ran on: versions, processor or GPU, threads, time of day (UTC)."""
    import torch

    packages = ("dora-lab", "torch", "transformers", "peft", "datasets", "numpy")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": threads,
        "versions": {name: version(name) for name in packages},
    }
