"""Exercises of chapter 03: the parts of a DoRA layer."""

import torch
from torch import nn

from dora_lab import adapters, geometry
from dora_lab.exercises.engine import Exercise, Malformed, Misconception, function, seeded

SIZE, RANK, SCALING = 6, 2, 1.5


def _parts():
    """W0 (6, 6), m (6,), A (2, 6), B (6, 2): a layer in the middle of its training."""
    W0, A, B = seeded((SIZE, SIZE), (RANK, SIZE), (SIZE, RANK), seed=7)
    return W0, geometry.magnitude(W0) * 1.25 + 0.1, A, B


def _observe_start(answer):
    W0 = _parts()[0]
    parts = function(answer, "W0, rank")(W0.clone(), RANK)
    if parts is None or parts is ...:
        return None
    if not isinstance(parts, tuple | list) or len(parts) != 3:
        raise Malformed("Return three tensors: m, A, B.")
    m, A, B = (torch.as_tensor(part).detach() for part in parts)
    return m, tuple(A.shape), tuple(B.shape), bool(A.count_nonzero()), bool(B.count_nonzero())


def _expected_start():
    linear = nn.Linear(SIZE, SIZE, bias=False).double()
    linear.weight.data = _parts()[0]
    layer = adapters.DoRALinear(linear, adapters.AdapterConfig("dora", rank=RANK, alpha=1.0))
    return _observe_start(lambda W0, rank: (layer.magnitude, layer.lora_A, layer.lora_B))


def _observe_weight(answer):
    return function(answer, "W0, m, A, B, s")(*_parts(), SCALING)


def _observe_forward(answer):
    """The output and the gradients of m, A and B."""
    x = seeded((4, SIZE), seed=8)[0]
    W0, *trained = _parts()
    trained = [part.clone().requires_grad_() for part in trained]
    y = function(answer, "x, W0, m, A, B, s")(x, W0, *trained, SCALING)
    if y is None or y is ...:
        return None
    if not isinstance(y, torch.Tensor):
        raise Malformed(f"Return the output, a tensor; this is a {type(y).__name__}.")
    if not y.requires_grad:
        return (y, *(torch.zeros_like(part) for part in trained))
    loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return (y, *(torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)))


def _observe_output(answer):
    base_output, low_rank = seeded((4, SIZE), (4, SIZE), seed=9)
    gain, bias = seeded((SIZE,), (SIZE,), seed=10)
    return function(answer, "base_output, low_rank, gain, bias")(base_output, low_rank, gain.abs() + 0.5, bias)


def _expected_output():
    """What the layer gives whose base output, low-rank output, gain and bias these are."""
    base_output, low_rank = seeded((4, SIZE), (4, SIZE), seed=9)
    gain, bias = seeded((SIZE,), (SIZE,), seed=10)
    identity = torch.eye(SIZE, dtype=torch.float64)
    linear = nn.Linear(SIZE, SIZE).double()
    linear.weight.data, linear.bias.data = identity, bias
    layer = adapters.DoRALinear(linear, adapters.AdapterConfig("dora", rank=SIZE, alpha=SIZE))
    layer.magnitude.data, layer.lora_A.data, layer.lora_B.data = gain.abs() + 0.5, identity, identity
    return layer.reference(base_output, low_rank, torch.ones(SIZE, dtype=torch.float64))


def _observe_merge(answer):
    return function(answer, "W0, m, A, B, alpha, rank")(*_parts(), SCALING * RANK, RANK)


def _with(norm, weight=lambda W0, update: W0 + update):
    """Answers of 03.2 with a norm of their own."""

    def wrong(W0, m, A, B, s):
        V = weight(W0, s * B @ A)
        return m[:, None] * V / norm(W0, V)

    return wrong


def _row_norm(W):
    return W.norm(dim=1, keepdim=True)


def _forward(weight):
    return lambda x, *parts: x @ weight(*parts).T


_naive = adapters.dora_weight
_after = "ΔW added after normalising"
_wrong_axis = Misconception(
    "norm over the wrong axis",
    _with(lambda W0, V: V.norm(dim=0, keepdim=True)),
    "Your rows do not come out with the lengths in m: the norm runs over the outputs.",
)

EXERCISES = (
    Exercise(
        id="03.1",
        question="Write a function (W0, rank) that gives (m, A, B) as a DoRA layer starts, A drawn at random.",
        observe=_observe_start,
        expected=_expected_start,
        misconceptions=(
            Misconception(
                "m not initialised from W0",
                lambda W0, r: (torch.ones(len(W0)), torch.randn(r, W0.shape[1]), torch.zeros(len(W0), r)),
                "The layer would not start as the base layer: every output feature would begin with length one.",
            ),
            Misconception(
                "B not zero at start",
                lambda W0, r: (W0.norm(dim=1), torch.ones(r, W0.shape[1]), torch.ones(len(W0), r)),
                "The product of the factors is not zero, so fine-tuning would start from another model than the base.",
            ),
            Misconception(
                "A and B both zero",
                lambda W0, r: (W0.norm(dim=1), torch.zeros(r, W0.shape[1]), torch.zeros(len(W0), r)),
                "Each factor's gradient is multiplied by the other factor. With both at zero neither ever moves.",
            ),
            Misconception(
                "norm over the wrong axis",
                lambda W0, r: (W0.norm(dim=0), torch.ones(r, W0.shape[1]), torch.zeros(len(W0), r)),
                "The entries of m are lengths of columns here; there is one for each output feature.",
            ),
            Misconception(
                "m per layer instead of per output feature",
                lambda W0, r: (W0.norm(), torch.ones(r, W0.shape[1]), torch.zeros(len(W0), r)),
                "One m for the layer cannot give every row the length that it has in W0.",
            ),
            Misconception(
                "A zero and B random",
                lambda W0, r: (W0.norm(dim=1), torch.zeros(r, W0.shape[1]), torch.ones(len(W0), r)),
                "The product is zero as it should be, and the roles of the two factors are exchanged.",
            ),
            Misconception(
                "squared norm instead of norm",
                lambda W0, r: (W0.square().sum(dim=1), torch.ones(r, W0.shape[1]), torch.zeros(len(W0), r)),
                "m multiplies a unit vector and has to give back the row of W0, not a longer or shorter one.",
            ),
        ),
        hints=(
            "Before the first step the layer must compute exactly what the base layer computes.",
            "One factor has to be zero for that, and one must not be. LoRA's choice holds here too.",
        ),
    ),
    Exercise(
        id="03.2",
        question="Write a function (W0, m, A, B, s) that gives DoRA's weight W' of Eq. 5, shape (out, in).",
        observe=_observe_weight,
        expected=lambda: adapters.dora_weight(*_parts(), SCALING),
        misconceptions=(
            _wrong_axis,
            Misconception(
                _after,
                lambda W0, m, A, B, s: m[:, None] * W0 / _row_norm(W0) + s * B @ A,
                "The rows of the result are not as long as m says: the low-rank update is part of the direction.",
            ),
            Misconception(
                "norm of W0 only",
                _with(lambda W0, V: _row_norm(W0)),
                "You divide by a length that the direction had before the update. It has another one now.",
            ),
            Misconception(
                "s left out",
                lambda W0, m, A, B, s: _naive(W0, m, A, B, 1.0),
                "One of the arguments is not used: the update has a scaling.",
            ),
            Misconception(
                "squared norm instead of norm",
                _with(lambda W0, V: V.square().sum(dim=1, keepdim=True)),
                "Before m comes in, every row should have length one. Yours has not.",
            ),
            Misconception(
                "m per layer instead of per output feature",
                _with(lambda W0, V: V.norm()),
                "Dividing by one length for the whole layer does not make unit rows.",
            ),
            Misconception(
                "not normalised",
                lambda W0, m, A, B, s: m[:, None] * (W0 + s * B @ A),
                "m scales rows that still have their own length: the direction has to be a unit vector first.",
            ),
            Misconception(
                "m left out",
                lambda W0, m, A, B, s: (W0 + s * B @ A) / _row_norm(W0 + s * B @ A),
                "These are directions. The magnitudes are still to come.",
            ),
            Misconception(
                "m along the wrong axis",
                lambda W0, m, A, B, s: m * (W0 + s * B @ A) / _row_norm(W0 + s * B @ A),
                "The directions are right, and m multiplies columns: broadcasting lines shapes up from the right.",
            ),
        ),
        hints=(
            "Whatever A and B are, the row norms of the result must equal |m|.",
            "Add first, then normalise each row, then scale it.",
        ),
    ),
    Exercise(
        id="03.3",
        question="Write a function (x, W0, m, A, B, s) that gives the output of a DoRA layer, trained as in Sec. 4.3.",
        observe=_observe_forward,
        expected=lambda: _observe_forward(_forward(adapters.dora_weight)),
        misconceptions=(
            Misconception(
                "no detach",
                _forward(lambda *parts: adapters.dora_weight(*parts, detach_norm=False)),
                "The output is right. The gradients of A and B are those of Eq. 6: the norm is still differentiated.",
            ),
            Misconception(
                "too much detached",
                _forward(lambda W0, m, A, B, s: _naive(W0, m, A.detach(), B.detach(), s)),
                "The output is right, and A and B get no gradient: the direction is held constant, not only its norm.",
            ),
            Misconception(
                "m gets no gradient",
                _forward(lambda W0, m, A, B, s: adapters.dora_weight(W0, m.detach(), A, B, s)),
                "The output is right, and m would never be trained: only the norm is a constant.",
            ),
            Misconception(
                "nothing is trained",
                _forward(lambda *parts: adapters.dora_weight(*parts).detach()),
                "The output is right, and no gradient flows at all.",
            ),
            Misconception(_wrong_axis.name, _forward(_wrong_axis.wrong), _wrong_axis.message),
            Misconception(
                _after,
                _forward(lambda W0, m, A, B, s: m[:, None] * W0 / _row_norm(W0) + s * B @ A),
                "The low-rank update is part of the direction: here it escapes the normalisation.",
            ),
            Misconception(
                "norm of W0 only",
                _forward(_with(lambda W0, V: _row_norm(W0))),
                "Constant in the backward pass does not mean constant in training: the norm follows A and B.",
            ),
        ),
        hints=(
            "The value of the norm is used in the forward pass, and its derivative nowhere.",
            "Which one tensor has to be cut out of the graph, so that m, A and B keep theirs?",
        ),
    ),
    Exercise(
        id="03.4",
        question=(
            "Write a function (base_output, low_rank, gain, bias) that gives a DoRA layer's output; base_output is the "
            "frozen layer's, with its bias."
        ),
        observe=_observe_output,
        expected=_expected_output,
        misconceptions=(
            Misconception(
                "bias scaled with the gain",
                lambda y, low, g, b: g * (y + low),
                "m scales the weight. The bias is not part of the weight, and is multiplied all the same here.",
            ),
            Misconception(
                "gain on the low-rank part only",
                lambda y, low, g, b: y + g * low,
                "The frozen weight is part of the direction too, and is left at its old length here.",
            ),
            Misconception(
                "gain on the base only",
                lambda y, low, g, b: g * (y - b) + b + low,
                "This adds the update after normalising: it does not get the gain.",
            ),
            Misconception(
                "bias twice",
                lambda y, low, g, b: g * (y - b + low) + y,
                "With a gain of one and no update the base output should come back, once.",
            ),
            Misconception(
                "bias lost",
                lambda y, low, g, b: g * (y - b + low),
                "With a gain of one and no update the base output should come back, its bias included.",
            ),
            Misconception(
                "bias added twice",
                lambda y, low, g, b: g * (y + low) + b,
                "base_output has the bias in it already.",
            ),
        ),
        hints=(
            "With gain 1 and low_rank 0 the result is base_output. With gain 2 it is not 2·base_output.",
            "Take the bias off, do all that concerns the weight, put it back.",
        ),
    ),
    Exercise(
        id="03.5",
        question="Write a function (W0, m, A, B, alpha, rank) that gives the merged weight, to be put in place of W0.",
        observe=_observe_merge,
        expected=lambda: adapters.dora_weight(*_parts(), SCALING),
        misconceptions=(
            Misconception(
                "alpha without / r",
                lambda W0, m, A, B, alpha, r: _naive(W0, m, A, B, alpha),
                "The update is scaled by alpha as it stands. At another rank the same alpha means another s.",
            ),
            Misconception(
                "merge without s",
                lambda W0, m, A, B, alpha, r: _naive(W0, m, A, B, 1.0),
                "The layer was trained with a scaling of the update; the merged weight has to have it as well.",
            ),
            Misconception(
                "r counted as alpha",
                lambda W0, m, A, B, alpha, r: _naive(W0, m, A, B, r),
                "The rank is a size, not the strength of the update.",
            ),
            Misconception(
                "merged as LoRA",
                lambda W0, m, A, B, alpha, r: W0 + alpha / r * B @ A,
                "This merges the update and forgets that the magnitudes were trained too.",
            ),
            Misconception(
                _after,
                lambda W0, m, A, B, alpha, r: m[:, None] * W0 / _row_norm(W0) + alpha / r * B @ A,
                "The rows of a merged weight have the lengths in m. Measure yours.",
            ),
            Misconception(
                "old lengths kept",
                lambda W0, m, A, B, alpha, r: _naive(W0, W0.norm(dim=1), A, B, alpha / r),
                "The directions are the trained ones, the lengths are those of W0.",
            ),
            Misconception(
                "m multiplied without normalising",
                lambda W0, m, A, B, alpha, r: m[:, None] * (W0 + alpha / r * B @ A),
                "m already is the length of a row; yours have it times the length they had.",
            ),
        ),
        hints=(
            "x @ merged.T has to be what the unmerged layer computes, bias apart.",
            "You have written this function in 03.2. What is s here?",
        ),
    ),
)
