"""Exercises of chapter 13: an effective rank, and who gets the next rank."""

import numpy as np

from dora_lab.exercises.engine import Exercise, Misconception, function

SPECTRA = (np.array([3.0, 2.0, 1.0, 0.5]), np.array([5.0, 5.0, 5.0]), np.array([9.0, 0.3, 0.1, 0.05, 0.02]))
# values of the next components, shapes (out, in); in some the largest value is not the best buy
OFFERS = (
    ((6.0, 5.0), ((160, 160), (160, 160))),
    ((6.0, 5.0), ((432, 160), (160, 160))),
    ((1.0, 4.0), ((160, 160), (432, 160))),
    ((2.0, 3.0, 2.5), ((160, 160), (432, 160), (160, 432))),
    ((4.0, 3.9), ((100, 300), (250, 130))),
)


def _entropy(shares):
    return -(shares * np.log(shares)).sum()


def _observe_choices(answer):
    choices = [function(answer, "values, shapes")(values, shapes) for values, shapes in OFFERS]
    return None if all(choice is None or choice is ... for choice in choices) else tuple(map(str, choices))


def _chosen(worth):
    return lambda values, shapes: int(
        np.argmax([worth(v, out, inp) for v, (out, inp) in zip(values, shapes, strict=True)])
    )


EXERCISES = (
    Exercise(
        id="13.1",
        question="Write a function of singular values (largest first) that gives the effective rank.",
        observe=lambda answer: tuple(function(answer, "values")(values.copy()) for values in SPECTRA),
        expected=lambda: tuple(np.exp(_entropy(values / values.sum())) for values in SPECTRA),
        misconceptions=(
            Misconception(
                "entropy without the exponential",
                lambda values: _entropy(values / values.sum()),
                "An entropy is a logarithm. For k equal values it is log k, and a rank should be k.",
            ),
            Misconception(
                "shares of the energy",
                lambda values: np.exp(_entropy(values**2 / (values**2).sum())),
                "Roy and Vetterli take each value's share of the sum, not of the sum of squares.",
            ),
            Misconception(
                "stable rank",
                lambda values: (values**2).sum() / values[0] ** 2,
                "This compares everything with the first value. It is the stable rank, the other of the two.",
            ),
            Misconception(
                "base of the logarithm",
                lambda values: np.exp(_entropy(values / values.sum()) / np.log(2)),
                "The exponential has to undo the logarithm: the two need the same base.",
            ),
            Misconception(
                "values not shares",
                lambda values: np.exp(_entropy(values)),
                "An entropy is one of shares that sum to 1. A weight twice as large has the same rank.",
            ),
            Misconception(
                "counted",
                lambda values: float((values > 0).sum()),
                "Every value above zero counts as a whole direction here, however small.",
            ),
        ),
        hints=(
            "What do the values have to be divided by before an entropy can be taken?",
            "Try it on k equal values: the answer must be k, whatever their size.",
        ),
    ),
    Exercise(
        id="13.2",
        question="Write a function (values, shapes): the index of the module that should get the next rank.",
        observe=_observe_choices,
        expected=lambda: tuple(str(_chosen(lambda v, out, inp: v / (out + inp))(*offer)) for offer in OFFERS),
        misconceptions=(
            Misconception(
                "price ignored",
                _chosen(lambda v, out, inp: v),
                "The budget is one of parameters, and a rank does not cost the same everywhere.",
            ),
            Misconception(
                "price of a full matrix",
                _chosen(lambda v, out, inp: v / (out * inp)),
                "One more rank is one more row of A and one more column of B, not another matrix.",
            ),
            Misconception(
                "price of one side",
                _chosen(lambda v, out, inp: v / inp),
                "A rank adds to both A and B.",
            ),
            Misconception(
                "price of one side",
                _chosen(lambda v, out, inp: v / out),
                "A rank adds to both A and B.",
            ),
            Misconception(
                "cheapest first",
                _chosen(lambda v, out, inp: -(out + inp)),
                "What a component is worth counts as well.",
            ),
        ),
        hints=("How many parameters does one more rank take in a module (out, in)?", "Value for each parameter."),
    ),
)
