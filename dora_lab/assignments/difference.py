"""What the runs of assignment 04 say, for its hidden test alone: the exercise asks for this very computation, so that
nothing which a student's set-up imports may have it.
"""

from pathlib import Path

from dora_lab.records import read_predictions, read_record
from dora_lab.statistics import correct_by_id


def paired(folder: Path, arms: dict[str, list[str]]) -> tuple[float, int]:
    """(second arm's mean accuracy minus the first's, in points; how many answers of one seed and question are right in
    exactly one arm). The runs are paired by seed. Give what `experiment.examine` has passed.
    """
    right = []
    for run_ids in arms.values():
        by_seed = {read_record(folder / run_id).spec.seed: run_id for run_id in run_ids}
        right.append({seed: correct_by_id(read_predictions(folder / run_id)) for seed, run_id in by_seed.items()})
    first, second = ([arm[seed][q] for seed in sorted(arm) for q in sorted(arm[seed])] for arm in right)
    discordant = sum(a != b for a, b in zip(first, second, strict=True))
    return 100 * (sum(second) - sum(first)) / len(first), discordant
