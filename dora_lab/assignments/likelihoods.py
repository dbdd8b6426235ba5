"""Whether two sets of answers are one, by what the model found how likely: another seed changes nearly all of it."""

import functools

import numpy as np

from dora_lab.pipeline import RECORDED
from dora_lab.records import read_predictions, read_record

# A run made again on the same versions agrees to 6e-5; of two recorded runs with different seeds, one in five
# likelihoods at most agrees to 1e-4.
AGREEING = 1e-4


def likelihoods_of(rows: list[dict]) -> np.ndarray:
    """All log-likelihoods of a run's predictions, by question and candidate. Raises ValueError for no number."""
    ordered = sorted(rows, key=lambda row: row["id"])
    values = [value for row in ordered for _, value in sorted(row["log_likelihoods"].items())]
    if not all(type(value) in (int, float) and np.isfinite(value) for value in values):
        raise ValueError("a log-likelihood is no finite number")
    return np.array(values, dtype=float)


def alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether at least half of the likelihoods are the same: then the two were copied from one run."""
    if first.shape != second.shape or not first.size:
        return False
    return float(np.mean(np.abs(first - second) <= AGREEING)) >= 0.5


@functools.cache
def recorded(task: str) -> dict[str, tuple[int, np.ndarray]]:
    """run id -> (seed, likelihoods) of the runs of a task that ship with the project."""
    folders = [path.parent for path in sorted(RECORDED.glob(f"mini*/{task}-*/record.json"))]
    return {
        folder.name: (read_record(folder).spec.seed, likelihoods_of(read_predictions(folder))) for folder in folders
    }
