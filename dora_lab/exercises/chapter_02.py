"""Exercises of chapter 02: magnitude, direction, and the gradients of both."""

import torch

from dora_lab import geometry
from dora_lab.exercises.engine import Exercise, Malformed, Misconception, function, seeded

SIZE = 6  # square, so that a norm over the wrong axis has the right shape and can be told apart by its values


def _weight():
    return seeded((SIZE, SIZE), seed=3)[0]


def _observe_decomposition(answer):
    parts = function(answer, "weight")(_weight())
    if parts is None or parts is ...:
        return None
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise Malformed("Return two tensors, magnitude and direction.")
    return tuple(parts)


def _observe_direction_change(answer):
    base, change = seeded((SIZE, SIZE), (SIZE, SIZE), seed=4)
    return function(answer, "weight, base")(base + 0.4 * change, base)


def _expected_direction_change():
    base, change = seeded((SIZE, SIZE), (SIZE, SIZE), seed=4)
    return geometry.delta_direction(base + 0.4 * change, base)


def _observe_gradient(answer):
    V, grad = seeded((SIZE, SIZE), (SIZE, SIZE), seed=5)
    m = seeded((SIZE,), seed=6)[0].abs() + 0.5
    return function(answer, "grad_W, V, m")(grad, V, m)


def _expected_gradient():
    V, grad = seeded((SIZE, SIZE), (SIZE, SIZE), seed=5)
    m = seeded((SIZE,), seed=6)[0].abs() + 0.5
    V.requires_grad_()
    weight = m[:, None] * geometry.direction(V)
    return torch.autograd.grad((weight * grad).sum(), V)[0]


def _wrong_eq6(sign=-1.0, norm_power=2, gain_power=1, dim=1, use_m=True):
    """Eq. 6 with something changed; with these defaults nothing is, so every user changes something."""

    def gradient(grad, V, m):
        n = V.norm(dim=dim, keepdim=True)
        along = (grad * V).sum(dim=dim, keepdim=True) / n**norm_power
        gain = (m[:, None] if use_m else 1.0) / n**gain_power
        return gain * (grad + sign * along * V)

    return gradient


def _cosines(weight, base, dim=1):
    return torch.cosine_similarity(weight, base, dim=dim)


EXERCISES = (
    Exercise(
        id="02.1",
        question="Write a function (weight) that gives the magnitude of a PyTorch weight (out, in), shape (out,).",
        observe=lambda answer: function(answer, "weight")(_weight()),
        expected=lambda: geometry.magnitude(_weight()),
        misconceptions=(
            Misconception(
                "norm over the wrong axis",
                lambda W: W.norm(dim=0),
                "You have one number per input feature. What is one output feature's weight: a row or a column?",
            ),
            Misconception(
                "squared norm instead of norm",
                lambda W: W.square().sum(dim=1),
                "Doubling a weight has to double its magnitude; here it makes it four times as large.",
            ),
            Misconception(
                "m per layer instead of per output feature",
                lambda W: W.norm(),
                "One number for the layer ties all output features together; each has a length of its own.",
            ),
            Misconception(
                "sum of absolute values",
                lambda W: W.abs().sum(dim=1),
                "That is another norm: it depends on the axes that the row is written in. Length does not.",
            ),
            Misconception(
                "mean instead of sum",
                lambda W: W.square().mean(dim=1).sqrt(),
                "A root mean square shrinks with the number of inputs; a length does not.",
            ),
        ),
        hints=(
            "Scale the weights of one output feature by 3. Exactly one entry of the result should change.",
            "The axis that disappears is the one that is summed over.",
        ),
    ),
    Exercise(
        id="02.2",
        question="Write a function (weight) that gives (magnitude, direction), shapes (out,) and (out, in).",
        observe=_observe_decomposition,
        expected=lambda: (geometry.magnitude(_weight()), geometry.direction(_weight())),
        misconceptions=(
            Misconception(
                "norm over the wrong axis",
                lambda W: (W.norm(dim=0), W / W.norm(dim=0)),
                "Your directions have length one along the inputs of other features: each row is one feature.",
            ),
            Misconception(
                "direction not normalised",
                lambda W: (W.norm(dim=1), W),
                "The second part still has its lengths in it: multiplying by m would count them twice.",
            ),
            Misconception(
                "divided by the squared norm",
                lambda W: (W.norm(dim=1), W / W.square().sum(dim=1, keepdim=True)),
                "A direction has length one; measure the length of yours.",
            ),
            Misconception(
                "m per layer instead of per output feature",
                lambda W: (W.norm().expand(len(W)), W / W.norm()),
                "One length for the whole layer: the rows of your direction have all kinds of lengths.",
            ),
            Misconception(
                "broadcast along the wrong axis",
                lambda W: (W.norm(dim=1), W / W.norm(dim=1)),
                "The magnitudes are right. Dividing (out, in) by (out,) without a new axis divides column by column.",
            ),
        ),
        hints=(
            "Two checks that need no reference: magnitude times direction is the weight; every row has length one.",
            "Broadcasting lines shapes up from the right: (out, in) against (out,) is not what is wanted.",
        ),
    ),
    Exercise(
        id="02.3",
        question="Write a function (weight, base) that gives ΔD of Eq. 4, the mean change of direction.",
        observe=_observe_direction_change,
        expected=_expected_direction_change,
        misconceptions=(
            Misconception(
                "cosine instead of 1 - cosine",
                lambda W, W0: _cosines(W, W0).mean(),
                "This is largest when nothing has changed. A change should be zero then.",
            ),
            Misconception(
                "norm over the wrong axis",
                lambda W, W0: (1 - _cosines(W, W0, dim=0)).mean(),
                "You compare what single inputs do. A direction belongs to an output feature.",
            ),
            Misconception(
                "angle instead of 1 - cosine",
                lambda W, W0: _cosines(W, W0).acos().mean(),
                "The angle grows with the change as well, and is not the measure that the paper plots.",
            ),
            Misconception(
                "one direction for the whole layer",
                lambda W, W0: 1 - _cosines(W.flatten(), W0.flatten(), dim=0),
                "The layer is taken as one long vector, so large rows outweigh small ones.",
            ),
            Misconception(
                "magnitude not taken out",
                lambda W, W0: (W - W0).norm(dim=1).mean(),
                "Scaling the base by 2 would count as a change here, and its directions are the same.",
            ),
            Misconception(
                "sum instead of mean",
                lambda W, W0: (1 - _cosines(W, W0)).sum(),
                "A layer with twice the features would have twice the change. Average instead.",
            ),
        ),
        hints=("Scaling `weight` by 2 must not change the result.", "Cosine of each pair of rows first, mean last."),
    ),
    Exercise(
        id="02.4",
        question="Write a function (grad_W, V, m) that gives the gradient of V in W = m·V/‖V‖ (Eq. 6) by hand.",
        observe=_observe_gradient,
        expected=_expected_gradient,
        misconceptions=(
            Misconception(
                "norm held constant",
                _wrong_eq6(sign=0.0),
                "This treats the norm as a number that does not depend on V. It is what DoRA does in Sec. 4.3, and not "
                "the gradient that was asked for.",
            ),
            Misconception(
                "projection with the wrong sign",
                _wrong_eq6(sign=+1.0),
                "The part along V comes out doubled. Which part of a change of V is undone by the division?",
            ),
            Misconception(
                "projection not normalised",
                _wrong_eq6(norm_power=0),
                "Projecting twice must equal projecting once. Try it with yours.",
            ),
            Misconception(
                "projection divided by the norm once",
                _wrong_eq6(norm_power=1),
                "Both factors of the projection carry a length that has to go.",
            ),
            Misconception(
                "norm over the wrong axis",
                _wrong_eq6(dim=0),
                "The projection mixes output features; each row of V has a gradient of its own.",
            ),
            Misconception(
                "m left out",
                _wrong_eq6(use_m=False),
                "A feature with a large magnitude passes on a larger gradient; here it does not.",
            ),
            Misconception(
                "squared norm instead of norm",
                _wrong_eq6(gain_power=2),
                "Doubling V has to halve its gradient. Yours falls faster.",
            ),
        ),
        hints=(
            "Moving V along itself changes nothing, so the gradient has no part along V: test that row by row.",
            "Start from m/‖V‖ times grad_W and take away its component along the unit vector of V.",
        ),
    ),
)
