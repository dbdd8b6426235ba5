"""How sure a number is: intervals over seeds, over questions, and over both for the difference of two methods.

Accuracies are fractions in [0, 1] throughout. Multiply by 100 for percent, or for percentage points of a difference.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence limits; the limits are NaN where the data cannot give any.

    `seeds` and `items` count what the estimate rests on, where that is known.
    """

    estimate: float
    low: float
    high: float
    level: float = 0.95
    seeds: int | None = None
    items: int | None = None

    @property
    def half_width(self) -> float:
        """Half the distance between the limits."""
        return (self.high - self.low) / 2


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over seeds with Student's t limits, `mean ± t(level, k - 1) · s / √k` for k values.

    It says how far the mean would move with other seeds, the questions staying the same. One seed gives NaN limits:
    a single run says nothing of the spread. Raises ValueError for no value, or one that is not finite.
    """
    values = np.asarray(list(values), dtype=float)  # (seeds,)
    _check_level(level)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"seed_interval needs at least one finite value, got {values.tolist()}")
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, math.nan, math.nan, level, seeds=1)
    half = float(stats.t.ppf((1 + level) / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return Interval(mean, mean - half, mean + half, level, seeds=int(values.size))


def wilson_interval(correct: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of `correct` right answers in `n` questions: one trained model, other questions.

    Raises ValueError unless 0 <= correct <= n and n >= 1.
    """
    _check_level(level)
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"wilson_interval needs 0 <= correct <= n and n >= 1, got correct={correct}, n={n}")
    low, high = proportion_confint(correct, n, alpha=1 - level, method="wilson")
    return Interval(correct / n, float(low), float(high), level, items=n)


def correct_by_id(predictions: Iterable[Mapping]) -> dict[str, bool]:
    """{example id: answered right} from the rows of a `predictions.jsonl`.

    Raises ValueError if an id occurs twice.
    """
    answers = {}
    for row in predictions:
        if row["id"] in answers:
            raise ValueError(f"the example {row['id']!r} occurs twice in the predictions: give those of one run")
        answers[row["id"]] = row["prediction"] == row["gold"]
    return answers


@dataclass(frozen=True)
class PairedDraws:
    """A bootstrap of one mean difference, over questions and seeds together, before a level has been chosen.

    `over_items` (resamples,): the mean difference when questions are drawn. `over_seeds` (resamples,): what drawing
    seeds adds to it, spread by √(k / (k - 1)), without which its variance would be too small. It is spread again, by
    t(`freedom`) / z at the level that is asked for: a variance that is known from few seeds only. `freedom` is k - 1.
    """

    estimate: float
    over_items: np.ndarray
    over_seeds: np.ndarray
    seeds: int
    items: int
    freedom: float

    def at(self, level: float) -> np.ndarray:
        """The draws (resamples,) whose percentiles are the limits at `level`."""
        upper = (1 + level) / 2
        spread = stats.t.ppf(upper, self.freedom) / stats.norm.ppf(upper) if self.freedom else 0.0
        return self.over_items + spread * self.over_seeds

    def interval(self, level: float = 0.95) -> Interval:
        """Percentiles of the draws around the estimate."""
        _check_level(level)
        upper = (1 + level) / 2
        low, high = np.quantile(self.at(level), [1 - upper, upper])
        return Interval(self.estimate, float(low), float(high), level, seeds=self.seeds, items=self.items)


def mean_of_draws(draws: Collection[PairedDraws]) -> PairedDraws:
    """The bootstrap of the mean of independent differences, of several tasks say: every one counts the same.

    Its freedom is Welch and Satterthwaite's: seeds of several tasks tell more of the spread than those of one. `seeds`
    of the result is the fewest, `items` the sum.
    """
    known = [(float(one.over_seeds.var()), one.freedom) for one in draws if one.freedom]
    total, uncertain = sum(v for v, _ in known), sum(v**2 / freedom for v, freedom in known)
    freedom = total**2 / uncertain if uncertain else min((freedom for _, freedom in known), default=0.0)
    return PairedDraws(
        float(np.mean([one.estimate for one in draws])),
        np.mean([one.over_items for one in draws], axis=0),  # (resamples,)
        np.mean([one.over_seeds for one in draws], axis=0),  # (resamples,)
        min(one.seeds for one in draws),
        sum(one.items for one in draws),
        freedom,
    )


def paired_draws(
    first: Mapping[int, Mapping[str, bool]],
    second: Mapping[int, Mapping[str, bool]],
    resamples: int = 4000,
    bootstrap_seed: int = 0,
) -> PairedDraws:
    """The bootstrap behind `paired_difference`; same arguments, same errors."""
    return draws_of(paired_scores(first, second), resamples, bootstrap_seed)


def paired_scores(
    first: Mapping[int, Mapping[str, bool]],
    second: Mapping[int, Mapping[str, bool]],
    seeds: Sequence[int] | None = None,
) -> np.ndarray:
    """(seeds, items): 1 where `first` alone was right, -1 where `second` alone was, else 0.

    `seeds` in this order, or all common ones. Raises ValueError as `paired_difference` does.
    """
    seeds = sorted(set(first) & set(second)) if seeds is None else list(seeds)
    if not seeds:
        raise ValueError(f"no common seed: one method has {sorted(first)}, the other {sorted(second)}")
    items = sorted(first[seeds[0]])
    for seed in seeds:
        for answers in (first[seed], second[seed]):
            if not items or set(answers) != set(items):
                raise ValueError(
                    f"the runs of seed {seed} did not answer the same questions as those of seed {seeds[0]}: "
                    "compare runs of one task, split and data version"
                )
    return np.array([[float(first[s][i]) - float(second[s][i]) for i in items] for s in seeds])


def draws_of(difference: np.ndarray, resamples: int = 4000, bootstrap_seed: int = 0) -> PairedDraws:
    """Bootstrap of the mean of `difference` (seeds, items): seeds and items are drawn together, with replacement."""
    return draws_together([difference], resamples, bootstrap_seed)[0]


def draws_together(
    differences: Sequence[np.ndarray], resamples: int = 4000, bootstrap_seed: int = 0
) -> list[PairedDraws]:
    """`draws_of` for several differences of the same seeds and items, with the same draws for all."""
    k, n = differences[0].shape
    spread = math.sqrt(k / (k - 1)) if k > 1 else 0.0
    generator = np.random.default_rng(bootstrap_seed)
    over_items: list[list[np.ndarray]] = [[] for _ in differences]
    over_seeds: list[list[np.ndarray]] = [[] for _ in differences]
    for size in _chunks(resamples, max(1, 2_000_000 // n)):
        of_items = generator.multinomial(n, np.full(n, 1 / n), size=size) / n  # (size, items)
        of_seeds = generator.multinomial(k, np.full(k, 1 / k), size=size) / k  # (size, seeds)
        for difference, items, seeds in zip(differences, over_items, over_seeds, strict=True):
            means = of_items @ difference.T  # (size, seeds)
            items.append(means.mean(axis=1))
            seeds.append(spread * (means * (of_seeds - 1 / k)).sum(axis=1))  # (size,); the weights sum to 0
    return [
        PairedDraws(float(difference.mean()), np.concatenate(items), np.concatenate(seeds), k, n, k - 1)
        for difference, items, seeds in zip(differences, over_items, over_seeds, strict=True)
    ]


def paired_difference(
    first: Mapping[int, Mapping[str, bool]],
    second: Mapping[int, Mapping[str, bool]],
    level: float = 0.95,
    resamples: int = 4000,
    bootstrap_seed: int = 0,
) -> Interval:
    """Accuracy of `first` minus accuracy of `second`, paired by seed and by question.

    Arguments: {seed: {example id: answered right}} of two methods on one task. Seeds that only one of them has are left
    out (`seeds` of the result counts the pairs). The limits are percentiles of a bootstrap that draws seeds and
    questions together, each with replacement. A bootstrap of k seeds is too narrow for small k, so the weights of the
    seeds are spread by √(k / (k - 1)) · t(k - 1) / z: if all questions agreed, the draws would be spread as Student's t
    limits are. The limits are percentiles, not mirrored: seeds that lie to one side pull both of them there.
    With one common seed only questions are drawn: the result then speaks of two trained models, not of two methods.

    Raises ValueError if there is no common seed, or the two answered different questions.
    """
    _check_level(level)
    return paired_draws(first, second, resamples, bootstrap_seed).interval(level)


def wording(difference: Interval) -> str:
    """What a difference lets one say: "ahead" or "behind" if the interval leaves out 0, else "no difference shown"."""
    if difference.low > 0:
        return "ahead"
    if difference.high < 0:
        return "behind"
    return "no difference shown"


def in_points(difference: Interval) -> str:
    """A difference of fractions as it is read: percentage points with their limits, `+0.3 (-0.4 to +1.1)`."""
    estimate, low, high = (100 * value for value in (difference.estimate, difference.low, difference.high))
    return f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, for instance 0.95, got {level}")


def _chunks(total: int, size: int) -> Iterable[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
