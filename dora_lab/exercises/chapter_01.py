"""Exercises of chapter 01: what a low-rank update costs and what it reaches."""

import torch
from torch import nn

from dora_lab.adapters import AdapterConfig, attach, lora_weight, trainable_parameters
from dora_lab.exercises.engine import Exercise, Misconception, function, number, seeded

OUT, IN, RANK = 4096, 1024, 8
ALPHA, SCALED_RANK = 12.0, 3


def count_lora(out_features: int, in_features: int, rank: int) -> int:
    """Counted on a layer without memory, not by a formula."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
    config = AdapterConfig("lora", rank=rank, alpha=1.0, target_modules=("0",))
    return trainable_parameters(attach(model, config, torch.Generator()))[0]


def _largest_saving_rank() -> int:
    size = 1024
    a_rank = count_lora(size, size, 1)
    return max(rank for rank in range(1, size) if rank * a_rank < size * size)


def _observe_update(answer):
    A, B = seeded((SCALED_RANK, 7), (7, SCALED_RANK), seed=1)
    return function(answer, "A, B, alpha, rank")(A, B, ALPHA, SCALED_RANK)


def _expected_update():
    A, B = seeded((SCALED_RANK, 7), (7, SCALED_RANK), seed=1)
    return lora_weight(torch.zeros(7, 7, dtype=torch.float64), A, B, ALPHA / SCALED_RANK)


def _observe_bound(answer):
    (target,) = seeded((9, 6), seed=2)
    return tuple(function(answer, "target, rank")(target.clone(), rank) for rank in (1, 2, 4))


def _expected_bound():
    (target,) = seeded((9, 6), seed=2)
    u, sigma, vh = torch.linalg.svd(target, full_matrices=False)
    return tuple(torch.dist(target, u[:, :r] * sigma[:r] @ vh[:r]) for r in (1, 2, 4))


def _sigma(target):
    return torch.linalg.svdvals(target)


EXERCISES = (
    Exercise(
        id="01.1",
        question=f"How many numbers does LoRA of rank {RANK} train on a layer of {IN} inputs and {OUT} outputs?",
        observe=number,
        expected=lambda: count_lora(OUT, IN, RANK),
        misconceptions=(
            Misconception("only A counted", RANK * IN, "That is the factor next to the input alone: there are two."),
            Misconception("only B counted", RANK * OUT, "That is the factor next to the output alone: there are two."),
            Misconception(
                "product counted",
                OUT * IN,
                "That is the size of the update that the factors make. What is trained is the factors.",
            ),
            Misconception("rank left out", OUT + IN, "Each factor has as many rows, or columns, as the rank says."),
            Misconception(
                "base weight counted",
                OUT * IN + RANK * (OUT + IN),
                "The base weight is frozen: it is in the model, and it is not trained.",
            ),
        ),
        hints=(
            "Write down the shape of A and the shape of B.",
            "One factor reads all inputs and gives `rank` numbers, the other makes all outputs from those.",
        ),
    ),
    Exercise(
        id="01.2",
        question="Write a function (A, B, alpha, rank) that gives LoRA's update of the weight, in (out, in) layout.",
        observe=_observe_update,
        expected=_expected_update,
        misconceptions=(
            Misconception(
                "alpha without / r",
                lambda A, B, alpha, rank: alpha * (B @ A),
                "Your factor in front grows with alpha alone. LoRA's is chosen so that another rank does not ask for "
                "another alpha.",
            ),
            Misconception(
                "scaling left out",
                lambda A, B, alpha, rank: B @ A,
                "The product of the factors is there, the scaling in front of it is not.",
            ),
            Misconception(
                "alpha and r swapped",
                lambda A, B, alpha, rank: rank / alpha * (B @ A),
                "The scaling is upside down: a larger alpha has to give a larger update.",
            ),
            Misconception(
                "scaling by the root of the rank",
                lambda A, B, alpha, rank: alpha / rank**0.5 * (B @ A),
                "That is the scaling of rank-stabilised LoRA, a later variant.",
            ),
            Misconception(
                "transposed",
                lambda A, B, alpha, rank: alpha / rank * (B @ A).T,
                "This has inputs and outputs exchanged: PyTorch keeps one row per output feature.",
            ),
        ),
        hints=(
            "Which order of the two factors gives a matrix with one row per output feature?",
            "Two settings make one number s. Doubling the rank at the same alpha halves s.",
        ),
    ),
    Exercise(
        id="01.3",
        question="Write a function (target, rank) that gives the smallest Frobenius error any update of that rank has.",
        observe=_observe_bound,
        expected=_expected_bound,
        misconceptions=(
            Misconception(
                "squared norm instead of norm",
                lambda target, rank: _sigma(target)[rank:].square().sum(),
                "This is the square of the error. An error has the unit of the entries themselves.",
            ),
            Misconception(
                "kept part instead of lost part",
                lambda target, rank: _sigma(target)[:rank].square().sum().sqrt(),
                "This measures what the update reaches. The error is what it does not reach.",
            ),
            Misconception(
                "spectral norm",
                lambda target, rank: _sigma(target)[rank],
                "This is the spectral norm's error: the largest missed direction alone. Frobenius counts them all.",
            ),
            Misconception(
                "singular values added",
                lambda target, rank: _sigma(target)[rank:].sum(),
                "Missed directions are at right angles, and lengths at right angles do not add up like that.",
            ),
            Misconception(
                "one rank off",
                lambda target, rank: _sigma(target)[rank + 1 :].square().sum().sqrt(),
                "One direction too many is taken as reached: look at where counting starts.",
            ),
            Misconception(
                "relative error",
                lambda target, rank: _sigma(target)[rank:].norm() / target.norm(),
                "This is the share of the target's norm. Asked for is the error itself.",
            ),
        ),
        hints=(
            "Eckart and Young: the best matrix of rank r keeps the r largest singular values.",
            "What is left over has singular values too. How does the Frobenius norm follow from them?",
        ),
    ),
    Exercise(
        id="01.4",
        question="What is the largest rank at which LoRA trains fewer numbers than a 1024×1024 weight has?",
        observe=number,
        expected=_largest_saving_rank,
        misconceptions=(
            Misconception("break-even counted", 512, "At this rank both have equally many. Fewer was asked."),
            Misconception("only one factor", 1023, "One factor alone would be smaller than the weight; count both."),
            Misconception(
                "full rank", 1024, "The largest rank a matrix can have is another question: count what is trained."
            ),
            Misconception(
                "the 98 % example", 10, "That is the rank of the example, which saves a lot. The largest was asked."
            ),
        ),
        hints=("How much does one unit of rank cost on this layer?", "Divide, then mind the word fewer."),
    ),
)
