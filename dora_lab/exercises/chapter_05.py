"""Exercises of chapter 05: chance, how many questions are enough, and two ways to score an answer."""

import math
from statistics import NormalDist

import pandas as pd

from dora_lab.exercises.engine import Exercise, Malformed, Misconception, function, number

OPTIONS = [2, 2, 4, 4, 4, 5]
SETTINGS = ((2.0, 0.10), (5.0, 0.30))  # d in percentage points, share of questions on which the two differ
CANDIDATES = ([-1.0, -1.2], [-0.7, -0.8, -0.9, -0.6], [-2.4])  # log-likelihoods of tokens: sums favour the first
MORE_CANDIDATES = ([-0.2, -3.0], [-0.9, -0.9, -0.9], [-1.6, -1.5], [-4.0])


def _observe_questions(answer):
    counts = [function(answer, "d_points, discordance")(d, share) for d, share in SETTINGS]
    if any(count is None or count is ... for count in counts):
        return None
    return tuple(math.ceil(number(count) - 1e-6) for count in counts)


def _expected_questions():
    """Found by trying: the first n whose interval leaves out 0."""
    z, found = NormalDist().inv_cdf(0.975), []
    for points, discordance in SETTINGS:
        d, n = points / 100, 1
        while d < z * math.sqrt((discordance - d**2) / n):
            n += 1
        found.append(n)
    return tuple(found)


def _wrong_questions(variance=lambda d, c: c - d**2, z=1.959964, unit=100, power=2, root=2):
    """n from another variance, quantile, unit or power; with these defaults nothing is changed."""
    return lambda points, c: z**root * variance(points / unit, c) / (points / unit) ** power


def _observe_choice(answer):
    picks = []
    for candidates in (CANDIDATES, MORE_CANDIDATES):
        picked = function(answer, "candidates")([list(tokens) for tokens in candidates])
        if picked is None or picked is ...:
            return None
        if not isinstance(picked, tuple | list) or len(picked) != 2:
            raise Malformed("Return two indices, (by_sum, by_mean).")
        picks.append(tuple(picked))
    return tuple(picks)


def _expected_choice():
    picks = []
    for candidates in (CANDIDATES, MORE_CANDIDATES):
        table = pd.DataFrame([pd.Series(tokens) for tokens in candidates])  # one row a candidate, NaN behind its end
        picks.append((int(table.sum(axis=1).idxmax()), int(table.mean(axis=1).idxmax())))
    return tuple(picks)


def _pick(first, second, best=max):
    def choose(candidates):
        places = range(len(candidates))
        return tuple(best(places, key=lambda i: score(candidates[i])) for score in (first, second))

    return choose


def _mean(tokens):
    return sum(tokens) / len(tokens)


EXERCISES = (
    Exercise(
        id="05.1",
        question="Write a function (candidates), lists of token log-likelihoods: the best index by sum and by mean.",
        observe=_observe_choice,
        expected=_expected_choice,
        misconceptions=(
            Misconception("sum and mean swapped", _pick(_mean, sum), "Both are there, in the other order."),
            Misconception("sum alone", _pick(sum, sum), "The second index takes no account of the lengths."),
            Misconception("mean alone", _pick(_mean, _mean), "The first index is averaged over tokens already."),
            Misconception(
                "smallest instead of largest",
                _pick(sum, _mean, best=min),
                "Log-likelihoods are negative: the likeliest answer is the one nearest to zero.",
            ),
            Misconception(
                "probabilities added",
                _pick(lambda t: sum(map(math.exp, t)), lambda t: _mean([math.exp(x) for x in t])),
                "Probabilities of successive tokens are multiplied; their logarithms are added.",
            ),
            Misconception(
                "first token alone",
                _pick(lambda t: t[0], lambda t: t[0]),
                "All tokens of an answer count, not only its first.",
            ),
        ),
        hints=(
            "The sum is the log-likelihood of the whole answer; every further token makes it smaller.",
            "The mean is per token, so that a long answer is not at a disadvantage for being long.",
        ),
    ),
    Exercise(
        id="05.2",
        question="Write a function (option_counts) that gives the accuracy of guessing, one count for each question.",
        observe=lambda answer: function(answer, "option_counts")(list(OPTIONS)),
        expected=lambda: pd.Series(OPTIONS).rdiv(1).mean(),
        misconceptions=(
            Misconception(
                "one over the mean number of options",
                lambda counts: len(counts) / sum(counts),
                "A question with few options is worth more to a guesser than the average number of options says.",
            ),
            Misconception(
                "percent instead of a share",
                lambda counts: 100 * sum(1 / c for c in counts) / len(counts),
                "Accuracies are shares between 0 and 1 here.",
            ),
            Misconception(
                "half for every task", lambda counts: 0.5, "Not every question has two answers to choose from."
            ),
            Misconception(
                "zero without knowledge", lambda counts: 0.0, "A guesser without any knowledge is right now and then."
            ),
            Misconception(
                "number of right answers instead of a share",
                lambda counts: sum(1 / c for c in counts),
                "This is how many questions a guesser gets right. The accuracy is a share of all questions.",
            ),
            Misconception(
                "the largest question counted for all",
                lambda counts: 1 / max(counts),
                "Only some of the questions have that many options.",
            ),
        ),
        hints=("What is the chance of guessing one question with k options right?", "Average what is averaged: which?"),
    ),
    Exercise(
        id="05.3",
        question=(
            "Two models answer the same n questions; on a share `discordance` of them one alone is right. "
            "Write a function (d_points, discordance): the n at which a difference of d points reaches 1.96 of its "
            "standard errors."
        ),
        observe=_observe_questions,
        expected=_expected_questions,
        misconceptions=(
            Misconception(
                "points taken as shares",
                _wrong_questions(unit=1),
                "A difference of 2 points is 0.02. With 2 in its place a share of questions cannot be that large.",
            ),
            Misconception(
                "unpaired",
                _wrong_questions(lambda d, c: 0.5),
                "This takes the two models for independent at an accuracy of one half. They answer the same questions.",
            ),
            Misconception(
                "one standard error",
                _wrong_questions(z=1.0),
                "One standard error is passed by chance in about a third of all comparisons.",
            ),
            Misconception(
                "square forgotten",
                _wrong_questions(power=1),
                "To see half the difference takes four times the questions; here it takes twice as many.",
            ),
            Misconception(
                "1.96 not squared",
                _wrong_questions(root=1),
                "When the equation is solved for n, the factor in front of the root is squared as well.",
            ),
            Misconception(
                "difference left in the variance",
                _wrong_questions(lambda d, c: c),
                "The mean square of the differences is not yet their variance.",
            ),
            Misconception(
                "standard deviation instead of variance",
                _wrong_questions(lambda d, c: math.sqrt(c - d**2)),
                "A standard error is a standard deviation over √n; solved for n, the deviation is squared.",
            ),
        ),
        hints=(
            "Per question the difference is +1, 0 or -1. Its mean is d; what is the mean of its square?",
            "Variance = mean square minus squared mean; set d equal to 1.96 times the root of variance / n.",
        ),
    ),
)
