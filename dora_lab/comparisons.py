"""Two methods on the same questions: who wins where, by which test, and what may be said of several tasks at once.

The primary comparison, whatever comes out, is the macro-average over tasks of the difference in accuracy
(`macro_difference`). Single tasks are secondary and are tested with Holm's correction. Accuracies and margins
are fractions in [0, 1]; `difference_pp` names percentage points.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as _mcnemar
from statsmodels.stats.multitest import multipletests

from dora_lab.power import smallest_detectable_difference
from dora_lab.statistics import Interval, PairedDraws, mean_of_draws, paired_draws, wording

PRIMARY = "macro-average over tasks of the difference in accuracy, DoRA minus LoRA"
Runs = Mapping[int, Mapping[str, bool]]  # seed -> {example id: answered right}


@dataclass(frozen=True)
class Pairs:
    """Questions that two models answered: both right, only the first, only the second, neither."""

    both: int
    first_only: int
    second_only: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def discordant(self) -> float:
        """Share of questions that exactly one of the two got right."""
        return (self.first_only + self.second_only) / self.n

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.first_only - self.second_only) / self.n

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: Binomial(discordant, 1/2); 1 where no question is discordant."""
        table = [[self.both, self.first_only], [self.second_only, self.neither]]
        return float(_mcnemar(table, exact=True).pvalue) if self.first_only + self.second_only else 1.0

    @property
    def detectable(self) -> float:
        """The smallest difference that McNemar's test finds four times out of five at this n and discordance.

        NaN where no question is discordant, or too few are.
        """
        return smallest_detectable_difference(self.n, self.discordant) if self.discordant else math.nan

    def interval(self, level: float = 0.95) -> Interval:
        """Difference of the two accuracies with Agresti and Min's limits (Statistics in Medicine 24, 2005).

        Half a question is added to each of the four counts, then Wald's limits for paired proportions are taken.
        """
        b, c, n = self.first_only + 0.5, self.second_only + 0.5, self.n + 2
        middle = (b - c) / n
        half = stats.norm.ppf((1 + level) / 2) * math.sqrt(b + c - (b - c) ** 2 / n) / n
        return Interval(self.difference, float(middle - half), float(middle + half), level, seeds=1, items=self.n)


def count_pairs(first: Mapping[str, bool], second: Mapping[str, bool]) -> Pairs:
    """The four counts of two models' answers, {example id: answered right}, joined by id.

    Raises ValueError if the two answered different questions, or none.
    """
    if not first or set(first) != set(second):
        apart = sorted(set(first) ^ set(second))
        raise ValueError(
            f"the two did not answer the same questions: {len(apart)} ids differ, {apart[:3]} among them; "
            "compare runs of one task, split and data version"
        )
    outcomes = np.array([[first[i], second[i]] for i in first], dtype=bool)  # (items, 2)
    a, b = outcomes.T
    return Pairs(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def by_seed(first: Runs, second: Runs) -> dict[int, Pairs]:
    """The counts of every common seed by itself: other seeds are other models, never more questions."""
    return {seed: count_pairs(first[seed], second[seed]) for seed in sorted(set(first) & set(second))}


def difference_p_value(draws: PairedDraws) -> float:
    """Two-sided p of a difference: 1 minus the level at which the interval just reaches 0.

    Never below 1 / resamples, which is as far as the bootstrap can see.
    """
    smallest = 1 / len(draws.over_items)
    inside, outside = 1 - smallest, 0.0  # levels: at the first the interval holds 0, at the second it does not
    if not _holds_zero(draws, inside):
        return smallest
    while inside - outside > smallest / 4:
        level = (inside + outside) / 2
        inside, outside = (level, outside) if _holds_zero(draws, level) else (inside, level)
    return 1 - inside


def macro_difference(first: Mapping[str, Runs], second: Mapping[str, Runs], level: float = 0.95) -> Interval:
    """Mean over tasks of accuracy of `first` minus that of `second`: every task counts the same, whatever its size.

    Arguments: task -> seed -> {example id: answered right}. Seeds and questions of each task are drawn by themselves,
    as they are other models and other questions. `items` of the result is the sum over tasks, `seeds` the fewest.
    Raises ValueError if the tasks differ, or as `paired_draws` does.
    """
    return macro_draws(first, second).interval(level)


def macro_draws(first: Mapping[str, Runs], second: Mapping[str, Runs]) -> PairedDraws:
    """The bootstrap behind `macro_difference`: every task with random numbers of its own. Same errors."""
    if not first or set(first) != set(second):
        raise ValueError(f"one method has {sorted(first)}, the other {sorted(second)}: give the same tasks")
    return mean_of_draws([paired_draws(first[task], second[task], bootstrap_seed=i) for i, task in enumerate(first)])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values over tasks: below 0.05 is significant with all the others counted in."""
    if not p_values:
        return {}
    return dict(zip(p_values, multipletests(list(p_values.values()), method="holm")[1].tolist(), strict=True))


def corrected_wording(
    differences: Mapping[str, Interval], adjusted: Mapping[str, float], level: float = 0.05
) -> dict[str, str]:
    """What each of several differences lets one say with all counted in: `wording`, if `holm`'s p is below `level`."""
    return {
        name: wording(one) if adjusted[name] < level else "no difference shown" for name, one in differences.items()
    }


def win_tie_loss(said: Iterable[str]) -> tuple[int, int, int]:
    """How many differences lie above 0, cannot be told from 0, and lie below it, by their wordings."""
    said = list(said)
    return said.count("ahead"), said.count("no difference shown"), said.count("behind")


def within(difference: Interval, margin: float) -> bool:
    """Equivalence: whether a difference's interval, of level 0.90 for two one-sided tests at 5 %, lies within ± margin.

    False means that this is not shown; it does not mean that they differ. Raises ValueError for a margin of 0 or less.
    """
    if not margin > 0:
        raise ValueError(f"margin must be above 0, for instance 0.01 for one percentage point, got {margin}")
    return -margin < difference.low and difference.high < margin


def _holds_zero(draws: PairedDraws, level: float) -> bool:
    found = draws.interval(level)
    return found.low <= 0 <= found.high
