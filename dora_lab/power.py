"""How many questions a difference needs: power of the exact McNemar test on paired answers.

Two models answer the same questions. Only the discordant ones count, those that exactly one of them gets right: of n
questions a share q is discordant, and a difference of accuracies d means that a discordant question goes to the better
model with probability (q + d) / 2q. Shares and differences are fractions in [0, 1].
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def mcnemar_power(
    questions: int, discordant: float, difference: float | Sequence[float], level: float = 0.05
) -> float | np.ndarray:
    """Probability that the exact two-sided McNemar test at `level` finds the difference, or each of several.

    The number of discordant questions is Binomial(n, q), so the power is averaged over it. Raises ValueError unless
    questions >= 1, 0 < discordant <= 1 and 0 <= difference <= discordant.
    """
    differences = np.atleast_1d(difference).astype(float)  # (differences,)
    for value in differences:
        _check(questions, discordant, value)
    plan = _plan(questions, discordant, level)
    power = np.array([_power(*plan, discordant, value) for value in differences])
    return power if np.ndim(difference) else float(power[0])


def smallest_detectable_difference(questions: int, discordant: float, power: float = 0.8, level: float = 0.05) -> float:
    """The difference that the test finds with probability `power`, to 1e-5; NaN where even the largest is missed more.

    The largest difference is `discordant` itself: every discordant question goes to one model.
    """
    _check(questions, discordant, 0.0)
    plan = _plan(questions, discordant, level)
    low, high = 0.0, discordant
    if _power(*plan, discordant, high) < power:
        return math.nan
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if _power(*plan, discordant, middle) < power else (low, middle)
    return high


def questions_needed(discordant: float, difference: float, power: float = 0.8, level: float = 0.05) -> int:
    """Questions with which the test finds `difference` with probability `power`; a search that doubles, then halves.

    Power does not rise evenly with n, because counts are whole; the answer is right to about one question in a hundred.
    Raises ValueError for a difference of 0, which no number of questions shows.
    """
    _check(1, discordant, difference)
    if difference == 0:
        raise ValueError("a difference of 0 cannot be shown: give one above 0")
    high = 1
    while mcnemar_power(high, discordant, difference, level) < power:
        high *= 2
    low = high // 2
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        if mcnemar_power(middle, discordant, difference, level) < power:
            low = middle
        else:
            high = middle
    return high


def _plan(questions: int, discordant: float, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(discordant counts, their probabilities, the largest count of the loser that is still significant, or -1)."""
    law = stats.binom(questions, discordant)
    counts = np.arange(law.ppf(1e-7), law.ppf(1 - 1e-7) + 1)
    limits = stats.binom.ppf(level / 2, counts, 0.5)  # the first count whose lower tail reaches level / 2
    limits -= stats.binom.cdf(limits, counts, 0.5) > level / 2
    return counts, law.pmf(counts), limits


def _power(counts: np.ndarray, weights: np.ndarray, limits: np.ndarray, discordant: float, difference: float) -> float:
    share = (discordant + difference) / (2 * discordant)
    won = stats.binom.cdf(limits, counts, 1 - share) + stats.binom.cdf(limits, counts, share)
    return float((weights * won).sum())


def _check(questions: int, discordant: float, difference: float) -> None:
    if questions < 1 or not 0 < discordant <= 1:
        raise ValueError(f"expected questions >= 1 and 0 < discordant <= 1, got {questions} and {discordant}")
    if not 0 <= difference <= discordant:
        raise ValueError(
            f"a difference of {difference} is not possible where a share of {discordant} is discordant: "
            "give a difference between 0 and that share"
        )
