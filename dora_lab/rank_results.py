"""The study of ranks from its records: accuracy of every criterion at every budget, against uniform and the controls.

At each budget a criterion is compared by the mean over tasks of the difference in accuracy, paired by seed and
question: with uniform ranks, and the criterion that has controls with its own ranks dealt anew. All of these
comparisons are tested together, with Holm's correction.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dora_lab.comparisons import difference_p_value, holm, macro_draws
from dora_lab.files import write_text
from dora_lab.pipeline import of_profile
from dora_lab.profiles import Profile
from dora_lab.rank_study import CONTROLLED, criterion_of
from dora_lab.ranks import CONTROLS, CRITERIA
from dora_lab.records import read_predictions, read_records, run_folder
from dora_lab.statistics import Interval, correct_by_id, in_points, seed_interval, wording
from dora_lab.tables import TASK_NAMES, markdown_table

CRITERION_NAMES = {
    "uniform": "uniform",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "update_spectrum": "update spectrum",
    "explained_variance": "explained variance",
    "gradient_spectrum": "gradient spectrum",
    "shuffled": f"shuffled ({CONTROLLED.replace('_', ' ')})",
    "reversed": f"reversed ({CONTROLLED.replace('_', ' ')})",
}


@dataclass(frozen=True)
class Cell:
    """All seeds of one task, criterion and budget. parameters: trained; answers: seed -> {example id: right}."""

    parameters: int
    accuracy: dict[int, float]
    answers: dict[int, dict[str, bool]]


Cells = Mapping[tuple[str, str, int], Cell]  # (task, criterion, rank of the uniform budget) -> cell


def read_cells(sources: Iterable[tuple[Profile, Path]], method: str = "dora") -> dict[tuple[str, str, int], Cell]:
    """The cells of the runs that each profile gives now, of those in the runs folder beside it; earlier ones first.

    The plain runs of the profile that a study extends are its uniform ones: the same run ids but for the variant. Those
    of other seeds than the study's own runs of the task are left out, so that one table has one set of seeds.
    """
    found: dict[tuple[str, str, int], dict] = defaultdict(dict)
    for profile, runs_dir in sources:
        for record in of_profile(profile, read_records(Path(runs_dir) / profile.name)[0]):
            of = criterion_of(record.spec)
            if record.spec.method == method and record.spec.split == "test" and of is not None:
                found[record.spec.task, *of].setdefault(record.spec.seed, (record, run_folder(runs_dir, record.spec)))
    studied = defaultdict(set)
    for (task, criterion, _), own in found.items():
        studied[task] |= own.keys() if criterion != "uniform" else set()
    for (task, _, _), own in found.items():
        for seed in own.keys() - studied[task] if studied[task] else ():
            del own[seed]
    return {
        key: Cell(
            next(record.result.trainable_parameters for record, _ in own.values()),
            {seed: record.result.accuracy for seed, (record, _) in sorted(own.items())},
            {seed: correct_by_id(read_predictions(folder)) for seed, (_, folder) in sorted(own.items())},
        )
        for key, own in found.items()
        if own
    }


def accuracy_table(cells: Cells) -> pd.DataFrame:
    """Columns task, criterion, rank (of the uniform budget), parameters, seeds, accuracy and half width in percent."""
    rows = []
    for (task, criterion, rank), cell in cells.items():
        interval = seed_interval(list(cell.accuracy.values()))
        row = {"task": task, "criterion": criterion, "rank": rank, "parameters": cell.parameters}
        row |= {"seeds": len(cell.accuracy), "accuracy": 100 * interval.estimate}
        rows.append(row | {"half_width": 100 * interval.half_width})
    columns = ["task", "criterion", "rank", "parameters", "seeds", "accuracy", "half_width"]
    rows.sort(key=lambda row: (list(TASK_NAMES).index(row["task"]), row["rank"], CRITERIA.index(row["criterion"])))
    return pd.DataFrame(rows, columns=columns)


def runs_of(cells: Cells, criterion: str, rank: int, tasks: Iterable[str]) -> dict[str, dict]:
    """{task: answers by seed} of one criterion and budget, of the tasks that have it."""
    return {task: cells[task, criterion, rank].answers for task in tasks if (task, criterion, rank) in cells}


def difference_table(cells: Cells) -> pd.DataFrame:
    """A row a criterion and budget: the `Interval` against uniform and, of the controlled criterion, both controls.

    Of the tasks and seeds that both sides have; None where there are none, or where the control is of another
    criterion's ranks. `p <other>` is Holm's, corrected over all the comparisons of the table; None for one seed.
    """
    rows, p_values = [], {}
    tasks = sorted({task for task, _, _ in cells})
    ranks = sorted({rank for _, criterion, rank in cells if criterion != "uniform"})
    for rank in ranks:
        for criterion in CRITERIA[1:]:
            own = runs_of(cells, criterion, rank, tasks)
            if not own:
                continue
            row = {"criterion": criterion, "rank": rank}
            for other in _OTHERS:
                against = runs_of(cells, other, rank, own) if other in _compared_with(criterion) else {}
                both = {task for task in against if set(own[task]) & set(against[task])}
                first, second = ({task: runs[task] for task in sorted(both)} for runs in (own, against))
                draws = macro_draws(first, second) if both else None
                row[other] = draws.interval() if both else None
                if both and row[other].seeds > 1:  # one seed says nothing of a criterion
                    p_values[criterion, rank, other] = difference_p_value(draws)
            rows.append(row)
    table = pd.DataFrame(rows, columns=["criterion", "rank", *_OTHERS])
    adjusted = holm(p_values)
    for other in _OTHERS:
        table[f"p {other}"] = [adjusted.get((row["criterion"], row["rank"], other)) for row in rows]
    return table


_OTHERS = ("uniform", *CONTROLS)


def _compared_with(criterion: str) -> tuple[str, ...]:
    return _OTHERS if criterion == CONTROLLED else ("uniform",)


def verdict(table: pd.DataFrame) -> list[str]:
    """What a `difference_table` lets one say, a criterion at a time: against uniform, and its ranks dealt anew.

    A single common seed compares two trained models and gives no verdict on a criterion.
    """
    lines = []
    asked = [name for name in CRITERIA if name in set(table["criterion"]) - set(CONTROLS)]
    for criterion in asked:
        rows = table[table["criterion"] == criterion].to_dict("records")
        for other in _compared_with(criterion):
            said = [
                f"{with_seeds(row[other])}, at the budget of rank {row['rank']}: "
                + _outcome(row[other], row[f"p {other}"])
                for row in rows
                if row[other] is not None
            ]
            against = "uniform ranks" if other == "uniform" else f"its own ranks {other}"
            lines.append(f"{CRITERION_NAMES[criterion]} minus {against}: {'; '.join(said) or 'not run'}.")
    alone = [CRITERION_NAMES[name] for name in asked if name != CONTROLLED]
    if alone:
        lines.append(
            f"The ranks of {', '.join(alone)} were not dealt anew: one of them that beat uniform ranks would still "
            "have to beat its own ranks shuffled."
        )
    return lines


def _outcome(difference: Interval, p_value: float | None) -> str:
    outcome = wording(difference)
    if difference.seeds == 1:
        return "one seed: no verdict"
    if p_value is not None and p_value >= 0.05 and not outcome.startswith("no"):
        return f"{outcome} by this interval, not with all comparisons counted in (p = {p_value:.2f})"
    return outcome


def percent(accuracy: float, half_width: float) -> str:
    """An accuracy in percent with half its interval, which a single seed does not have."""
    return f"{accuracy:.1f} (one seed)" if math.isnan(half_width) else f"{accuracy:.1f} ± {half_width:.1f}"


def with_seeds(difference: Interval) -> str:
    """A difference in percentage points with its limits and seeds."""
    return f"{in_points(difference)}, {difference.seeds} seed{'s' * (difference.seeds > 1)}"


def shown_differences(table: pd.DataFrame) -> pd.DataFrame:
    """A `difference_table` as it is read: points with limits, and p after Holm's correction."""
    shown = pd.DataFrame({"criterion": table["criterion"].map(CRITERION_NAMES), "rank": table["rank"]})
    for other in _OTHERS:
        cells = zip(table[other], table[f"p {other}"], strict=True)
        shown[f"minus {other}"] = [
            "" if one is None else with_seeds(one) + ("" if pd.isna(p) else f", p {p:.2f}") for one, p in cells
        ]
    return shown


def write_ranks(cells: Cells, differences: pd.DataFrame, folder: Path) -> Path:
    """`ranks.md`: accuracies, their `difference_table` and the verdict."""
    table = accuracy_table(cells)
    shown = table.drop(columns="half_width").assign(
        task=table["task"].map(TASK_NAMES),
        criterion=table["criterion"].map(CRITERION_NAMES),
        accuracy=[percent(row.accuracy, row.half_width) for row in table.itertuples()],
    )
    text = [
        "# Ranks by criterion at equal trainable parameters",
        "Accuracy in percent ± half the 95 % interval over seeds; `rank` is that of the uniform budget. What "
        "allots one rank to all modules has no row: those are the uniform runs.",
        markdown_table(shown),
        f"Mean over {' and '.join(table['task'].map(TASK_NAMES).unique())} of the difference in accuracy, in points, "
        "paired by seed and question, with 95 % limits; p after Holm's correction over all of these comparisons:",
        markdown_table(shown_differences(differences)),
        "\n".join(f"- {line}" for line in verdict(differences)),
    ]
    path = Path(folder) / "ranks.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n\n".join(text) + "\n")
    return path
