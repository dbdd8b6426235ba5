"""Exercises of chapter 09: reading ΔM against ΔD."""

import numpy as np

from dora_lab.exercises.engine import Exercise, Misconception, function

DELTA_D = np.array([0.02, 0.05, 0.04, 0.11, 0.16, 0.13])
DELTA_M = np.array([0.31, 0.20, 0.34, 0.12, 0.15, 0.02])
INTERVALS = ((0.83, 0.60, 0.93), (-0.62, -0.80, -0.35), (-0.31, -0.66, 0.16), (0.20, 0.05, 0.34), (0.55, -0.1, 0.9))


def _ranked(values):
    return np.argsort(np.argsort(values))


def _observe_readings(answer):
    readings = [function(answer, "r, low, high")(*interval) for interval in INTERVALS]
    return None if all(reading is None or reading is ... for reading in readings) else tuple(map(str, readings))


EXERCISES = (
    Exercise(
        id="09.1",
        question="Write a function (delta_d, delta_m) that gives the correlation the paper quotes (Pearson's).",
        observe=lambda answer: function(answer, "delta_d, delta_m")(DELTA_D.copy(), DELTA_M.copy()),
        expected=lambda: np.corrcoef(DELTA_D, DELTA_M)[0, 1],
        misconceptions=(
            Misconception(
                "slope instead of correlation",
                lambda d, m: np.polyfit(d, m, 1)[0],
                "The slope has units and changes when ΔM is measured in others; a correlation does not.",
            ),
            Misconception(
                "covariance instead of correlation",
                lambda d, m: np.cov(d, m)[0, 1],
                "A covariance grows with the spread of both. The correlation has the spreads divided out.",
            ),
            Misconception(
                "covariance instead of correlation",
                lambda d, m: ((d - d.mean()) * (m - m.mean())).mean(),
                "A covariance grows with the spread of both. The correlation has the spreads divided out.",
            ),
            Misconception(
                "squared correlation",
                lambda d, m: np.corrcoef(d, m)[0, 1] ** 2,
                "The square is the share of variance explained. It has lost the sign, and the sign is the point.",
            ),
            Misconception(
                "not centred",
                lambda d, m: d @ m / np.linalg.norm(d) / np.linalg.norm(m),
                "Two series of positive numbers always point the same way like this. Deviations from the mean count.",
            ),
            Misconception(
                "ranks instead of values",
                lambda d, m: np.corrcoef(_ranked(d), _ranked(m))[0, 1],
                "This is Spearman's correlation, of the ranks. The paper quotes Pearson's, of the values.",
            ),
            Misconception(
                "size without sign",
                lambda d, m: abs(np.corrcoef(d, m)[0, 1]),
                "Whether the two move together or against each other is what the figure is about.",
            ),
        ),
        hints=(
            "Subtract each series' mean first. What do you divide by, so that units drop out?",
            "It lies between -1 and 1, and shifting or stretching either series leaves it as it is.",
        ),
    ),
    Exercise(
        id="09.2",
        question='Write a function (r, low, high), r with its 95 % limits: "together", "against" or "undecided".',
        observe=_observe_readings,
        expected=lambda: tuple(
            {1: "together", -1: "against", 0: "undecided"}[int(np.sign(low) + np.sign(high)) // 2]
            for _, low, high in INTERVALS
        ),
        misconceptions=(
            Misconception(
                "interval ignored",
                lambda r, low, high: "together" if r > 0 else "against",
                "An estimate always has a sign. Whether the data settle it is another matter.",
            ),
            Misconception(
                "sign turned round",
                lambda r, low, high: "against" if low > 0 else "together" if high < 0 else "undecided",
                "With a positive correlation the layers that turn most also change length most.",
            ),
            Misconception(
                "size taken for certainty",
                lambda r, low, high: "undecided" if abs(r) < 0.5 else "together" if r > 0 else "against",
                "A weak correlation can be certain, and a strong one can rest on too few points.",
            ),
            Misconception(
                "never decided",
                lambda r, low, high: "undecided",
                "Some of these intervals leave out zero.",
            ),
            Misconception(
                "inside the interval taken for certain",
                lambda r, low, high: ("together" if r > 0 else "against") if low <= 0 <= high else "undecided",
                "An interval that contains zero allows both signs.",
            ),
        ),
        hints=("When is zero a value that the data allow?", "The limits decide whether, the sign decides which."),
    ),
)
