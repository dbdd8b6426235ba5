"""What the tests of `comparisons` say of two methods, as tables and sentences: percentage points, never a bare p-value.

`answers` throughout: (task, method) -> seed -> {example id: answered right}, as `pipeline.answers_of` gives them.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from dora_lab.comparisons import (
    PRIMARY,
    Runs,
    by_seed,
    corrected_wording,
    difference_p_value,
    holm,
    macro_difference,
    win_tie_loss,
    within,
)
from dora_lab.statistics import Interval, paired_draws, wording
from dora_lab.tables import METHOD_NAMES, TASK_NAMES

MARGIN = 0.01  # within one percentage point counts as the same
Answers = Mapping[tuple[str, str], Runs]


def both(answers: Answers, first: str = "dora", second: str = "lora") -> tuple[dict[str, Runs], dict[str, Runs]]:
    """task -> runs of the one and of the other method, for the tasks on which both have a run of the same seed."""
    tasks = [task for task in TASK_NAMES if set(answers.get((task, first), {})) & set(answers.get((task, second), {}))]
    return {task: answers[task, first] for task in tasks}, {task: answers[task, second] for task in tasks}


def difference_intervals(answers: Answers, first: str = "dora", second: str = "lora") -> dict[str, Interval]:
    """{"all tasks": the primary comparison, then every task's own}: differences as fractions with 95 % limits."""
    one, other = both(answers, first, second)
    if not one:
        return {}
    return {"all tasks": macro_difference(one, other)} | {
        TASK_NAMES[task]: paired_draws(one[task], other[task]).interval() for task in one
    }


def comparison_table(answers: Answers, first: str = "dora", second: str = "lora") -> pd.DataFrame:
    """One row a task: difference in points with its 95 % limits, p, p after Holm, what that lets one say, equivalence.

    Limits and p draw seeds and questions together. `within 1 point` asks whether a difference of less than `MARGIN`
    is shown, by two one-sided tests at 5 %.
    """
    one, other = both(answers, first, second)
    draws = {task: paired_draws(one[task], other[task]) for task in one}
    p_values = {task: difference_p_value(draw) for task, draw in draws.items()}
    adjusted, rows = holm(p_values), []
    said = corrected_wording({task: draw.interval() for task, draw in draws.items()}, adjusted)
    for task, draw in draws.items():
        found = draw.interval()
        row = {"task": TASK_NAMES[task], "seeds": found.seeds, "questions": found.items}
        row |= {"points": 100 * found.estimate, "low": 100 * found.low, "high": 100 * found.high}
        row |= {"p": p_values[task], "p (Holm)": adjusted[task], "said": said[task]}
        rows.append(row | {f"within {100 * MARGIN:g} point": within(draw.interval(0.90), MARGIN)})
    return pd.DataFrame(rows)


def mcnemar_table(answers: Answers, first: str = "dora", second: str = "lora") -> pd.DataFrame:
    """One row a task and seed: discordant questions of two trained models, exact McNemar, the detectable difference.

    Seeds stay apart: their questions are the same questions.
    """
    one, other = both(answers, first, second)
    rows = []
    for task in one:
        for seed, pairs in by_seed(one[task], other[task]).items():
            row = {"task": TASK_NAMES[task], "seed": seed, f"only {METHOD_NAMES[first]}": pairs.first_only}
            row |= {f"only {METHOD_NAMES[second]}": pairs.second_only, "points": 100 * pairs.difference}
            rows.append(row | {"p": pairs.p_value, "detectable (points)": 100 * pairs.detectable})
    return pd.DataFrame(rows)


def question_shares(runs: Runs) -> dict[str, float]:
    """{example id: share of seeds that answered it right}."""
    return {i: float(np.mean([answers[i] for answers in runs.values()])) for i in next(iter(runs.values()))}


def question_table(answers: Answers, methods: Sequence[str] = ("lora", "dora")) -> pd.DataFrame:
    """One row a task and method: questions that every seed, some seeds, no seed got right."""
    rows = []
    for task, name in TASK_NAMES.items():
        for method in methods:
            if answers.get((task, method)):
                shares = np.array(list(question_shares(answers[task, method]).values()))
                counts = {"every seed": (shares == 1).sum(), "no seed": (shares == 0).sum()}
                counts["some seeds"] = len(shares) - sum(counts.values())
                row = {"task": name, "method": METHOD_NAMES[method], "seeds": len(answers[task, method])}
                rows.append(row | {key: int(counts[key]) for key in ("every seed", "some seeds", "no seed")})
    return pd.DataFrame(rows)


def furthest_apart(answers: Answers, task: str, count: int = 5) -> list[tuple[str, float, float]]:
    """(example id, share of LoRA's seeds right, share of DoRA's) of the questions on which the two differ most."""
    lora, dora = question_shares(answers[task, "lora"]), question_shares(answers[task, "dora"])
    order = sorted(lora, key=lambda i: (-abs(dora[i] - lora[i]), i))
    return [(i, lora[i], dora[i]) for i in order[:count]]


def comparison_notes(answers: Answers) -> list[str]:
    """The primary comparison, Holm's correction, win, tie and loss over tasks: sentences for the results page."""
    found = difference_intervals(answers)
    if not found:
        return []
    primary = found.pop("all tasks")
    table = comparison_table(answers)
    said = wording(primary)
    notes = [
        f"Primary comparison, {PRIMARY}: {100 * primary.estimate:+.1f} points, 95 % interval "
        f"{100 * primary.low:+.1f} to {100 * primary.high:+.1f} ({len(found)} tasks): "
        f"{said if said.startswith('no') else f'DoRA is {said}'}."
    ]
    adjusted = ", ".join(f"{row['task']} {row['p (Holm)']:.2f}" for _, row in table.iterrows())
    wins, ties, losses = win_tie_loss(table["said"])
    notes.append(
        f"Tasks on which DoRA is ahead: {wins}; not told apart: {ties}; behind: {losses}. "
        f"p after Holm's correction over tasks: {adjusted}."
    )
    return notes


def sweep_table(rows: Iterable[Mapping], first: str = "dora", second: str = "lora") -> pd.DataFrame:
    """Validation accuracy in percent, mean over the sweep's seeds: both methods at each rate, then each at its best.

    A rate at which a run failed is empty. The best of a method is the best mean, picked on the same validation data, so
    that the last row of a task flatters both.
    """
    frame = pd.DataFrame(list(rows))
    frame = frame[frame["method"].isin([first, second])]
    means = 100 * frame.groupby(["task", "learning_rate", "method"])["accuracy"].agg(lambda v: v.mean(skipna=False))
    table = means.unstack("method")[[second, first]]
    found = []
    for task in (name for name in TASK_NAMES if name in table.index.get_level_values("task")):
        own = table.loc[task]
        found += [{"task": TASK_NAMES[task], "rate": f"{rate:g}"} | row.to_dict() for rate, row in own.iterrows()]
        found.append({"task": TASK_NAMES[task], "rate": "each at its best"} | own.max().to_dict())
    result = pd.DataFrame(found)
    result["points"] = result[first] - result[second]
    return result.rename(columns={method: METHOD_NAMES[method] for method in (first, second)})


def sweep_section(rows: Iterable[Mapping]) -> dict[str, tuple[str, pd.DataFrame]]:
    """`sweep_table` as a section of the results page, in text; none without rows."""
    rows = list(rows)
    if not rows:
        return {}
    seeds = len({row["seed"] for row in rows})
    said = (
        f"Validation accuracy in percent, mean over {seeds} seeds: one rate for both methods, as in a study without a "
        "search (the report names neither rate nor search), and each at its best, picked on these very scores. The "
        "table at the top has test questions and each method's rate from the profile."
    )
    shown = sweep_table(rows)
    numbers = shown.columns[2:]
    shown[numbers] = shown[numbers].map(lambda value: "failed" if pd.isna(value) else f"{value:.1f}")
    shown["points"] = [text if text[0] in "-f" else f"+{text}" for text in shown["points"]]
    return {"One rate for both, and each at its best": (said, shown)}
