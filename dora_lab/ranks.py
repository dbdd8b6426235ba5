"""A rank per module from a criterion and a budget of trainable parameters.

Two rules turn scores into ranks. Both start every module at rank 1, never pass min(out, in), and never pass the budget:

    one number a module      rank in proportion to it; what rounding leaves goes to the largest remainders
    (stable, effective rank)
    a spectrum a module      rank after rank to the module whose next component is worth most for every parameter
    (update, activations, gradient)

As singular values fall, the second keeps as much of what the spectrum measures as the budget can, but for what is left
at its end. alpha / rank is the same in every module, so that a component is scaled alike wherever it stands.
"""

import bisect
import heapq
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from dora_lab.adapter_config import LLAMA_TARGETS
from dora_lab.kernels import features_of, weight_of
from dora_lab.probes import activation_spectra, gradient_spectra, target_linears, update_spectra
from dora_lab.spectra import effective_rank, singular_values, stable_rank

MEASURES = {
    "update_spectrum": update_spectra,
    "explained_variance": activation_spectra,
    "gradient_spectrum": gradient_spectra,
}
CONTROLS = ("shuffled", "reversed")
CRITERIA = ("uniform", "stable_rank", "effective_rank", *MEASURES, *CONTROLS)

Shapes = Mapping[str, tuple[int, int]]  # module -> (out, in)


@dataclass(frozen=True)
class RankAllocation:
    """Ranks of all modules, in PEFT's form, and what they cost. `trainable_parameters` is at most `budget`."""

    criterion: str
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    trainable_parameters: int
    budget: int


def allocate_ranks(
    model: nn.Module,
    budget: int,
    criterion: str,
    *,
    method: str = "dora",
    target_modules: Sequence[str] = LLAMA_TARGETS,
    scaling: float = 2.0,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
    spectra: Mapping[str, Tensor] | None = None,
    of: RankAllocation | None = None,
    seed: int = 0,
) -> RankAllocation:
    """Ranks for the `target_modules` of `model`, plain or PEFT's, within `budget` trainable parameters.

    budget: low-rank matrices, and for `method` "dora" the magnitudes; `uniform_budget` is that of one rank everywhere.
    scaling: alpha / rank. Criteria:

        uniform             the largest rank that all can have
        stable_rank         in proportion to ‖W‖_F² / ‖W‖₂² of the frozen weight
        effective_rank      in proportion to exp(spectral entropy) of the frozen weight (Roy and Vetterli, 2007)
        update_spectrum     by σ² of the update that a short training of the whole weights made
        explained_variance  by the share of a component in the variance of the module's input (EVA, arXiv 2410.07170)
        gradient_spectrum   by σ² of the loss's gradient at the frozen weight
        shuffled            `of`'s ranks dealt at random, of `seed`, among modules where a rank costs the same
        reversed            `of`'s ranks with the largest where the smallest was, among the same

    EVA takes the largest shares whatever they cost; here a share counts for each parameter, as the budget is one of
    parameters. The three measured criteria need `batches` (input_ids and labels, as `probes` says) or the `spectra`
    that a probe gave for the same modules.
    Controls keep to modules of equal cost: dealt across, the same ranks would take another number of parameters. So
    they test where a rank goes among modules of one size, and leave how much each size has as it was.
    σ² is in the units of what is measured, and a share is not: `update_spectrum` and `gradient_spectrum` also compare
    modules by how large the whole is, `explained_variance` only by how fast it falls.
    Raises ValueError for an unknown criterion, a budget that does not give rank 1 everywhere, values that are no finite
    numbers, a missing argument, or ranks in `of` that cost more than the budget.
    """
    linears = target_linears(model, target_modules)
    shapes = {name: features_of(linear) for name, linear in linears.items()}
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}: choose one of {', '.join(CRITERIA)}")
    if method not in ("lora", "dora"):
        raise ValueError(f"method {method!r} has no ranks: choose lora or dora")
    if criterion in CONTROLS:
        if of is None or of.rank_pattern.keys() != shapes.keys():
            raise ValueError(f"criterion {criterion!r} deals ranks anew: give an allocation of this model as `of`")
        ranks = of.rank_pattern
        ranks = shuffled_ranks(shapes, ranks, seed) if criterion == "shuffled" else reversed_ranks(shapes, ranks)
        cost = adapter_parameters(shapes, ranks, method)
        if cost > budget:
            raise ValueError(
                f"the ranks to deal anew cost {cost} parameters with {method}, more than the budget of {budget}: they "
                f"were allocated within {of.budget}; give that budget and method"
            )
    elif criterion in MEASURES:
        if spectra is None:
            if not batches:
                raise ValueError(f"criterion {criterion!r} is measured: give batches of training data, or spectra")
            spectra = MEASURES[criterion](model, batches, target_modules)
        ranks = greedy_ranks(shapes, budget, component_values(spectra, criterion), method)
    elif criterion == "uniform":
        ranks = _uniform(shapes, budget, method)
    else:
        score = stable_rank if criterion == "stable_rank" else effective_rank
        scores = {name: score(singular_values(weight_of(linear))) for name, linear in linears.items()}
        ranks = proportional_ranks(shapes, budget, scores, method)
    ranks = _longest_first(ranks)
    alphas = {name: scaling * rank for name, rank in ranks.items()}
    return RankAllocation(criterion, ranks, alphas, adapter_parameters(shapes, ranks, method), budget)


def _longest_first(ranks: Mapping[str, int]) -> dict[str, int]:
    """In the model's order, but a name that ends another (`0` ends `1.0`) after it: the first key that fits counts."""
    return dict(sorted(ranks.items(), key=lambda item: -item[0].count(".")))


def component_values(spectra: Mapping[str, Tensor], criterion: str) -> dict[str, list[float]]:
    """What every component of a measured spectrum is worth: σ², or its share of the module's variance."""
    squares = {name: values.double().square() for name, values in spectra.items()}
    if criterion == "explained_variance":
        squares = {name: own / own.sum().clamp(min=torch.finfo(own.dtype).tiny) for name, own in squares.items()}
    return {name: own.tolist() for name, own in squares.items()}


def adapter_parameters(shapes: Shapes, ranks: Mapping[str, int], method: str = "dora") -> int:
    """Trainable parameters of LoRA or DoRA with these ranks: r·(out + in), and out magnitudes with DoRA."""
    return sum(ranks[name] * (out + inp) + (out if method == "dora" else 0) for name, (out, inp) in shapes.items())


def uniform_budget(shapes: Shapes, rank: int, method: str = "dora") -> int:
    """Trainable parameters of one rank everywhere, or min(out, in) where that is less."""
    return adapter_parameters(shapes, _capped(shapes, rank), method)


def proportional_ranks(
    shapes: Shapes, budget: int, scores: Mapping[str, float], method: str = "dora"
) -> dict[str, int]:
    """Ranks in proportion to `scores` (at least 0), each between 1 and min(out, in); largest remainders are rounded up.

    The factor of proportion is the one that meets the budget before rounding. Of equal remainders the larger score goes
    first, then the first in order. A module that cannot be raised because the rest of the budget is less than its cost
    leaves it to the next. All scores 0 count as equal.
    """
    _check(shapes, budget, method, scores)
    largest = {name: min(shape) for name, shape in shapes.items()}
    weights = {name: Fraction(scores[name]) for name in shapes}
    if not any(weights.values()):
        weights = dict.fromkeys(shapes, Fraction(1))

    def wanted(factor: Fraction) -> dict[str, Fraction]:
        return {name: min(max(factor * own, Fraction(1)), Fraction(largest[name])) for name, own in weights.items()}

    def cost(factor: Fraction) -> Fraction:
        return adapter_parameters(shapes, wanted(factor), method)

    # The cost is a straight line between the factors at which a module leaves rank 1 or is full.
    corners = sorted({end / own for name, own in weights.items() if own for end in (1, largest[name])})
    place = bisect.bisect_right(corners, budget, key=cost)
    factor = corners[place - 1]
    if place < len(corners):
        here, there = cost(factor), cost(corners[place])
        factor += (budget - here) * (corners[place] - factor) / (there - here)
    exact = wanted(factor)
    ranks = {name: int(own) for name, own in exact.items()}
    order = sorted(shapes, key=lambda name: (ranks[name] - exact[name], -weights[name]))  # sorted keeps ties in order
    return _spent(shapes, budget, ranks, order, method)


def greedy_ranks(
    shapes: Shapes, budget: int, values: Mapping[str, Sequence[float]], method: str = "dora"
) -> dict[str, int]:
    """Rank after rank to the module whose next component has the most value for each parameter, while it fits.

    values: {module: value of its first, second, … component}, falling; beyond their end they are 0. Of equal values the
    module of the lowest rank comes first, then the first in order.
    """
    _check(shapes, budget, method, values)
    ranks = dict.fromkeys(shapes, 1)
    left = budget - adapter_parameters(shapes, ranks, method)

    def entry(index: int, name: str) -> tuple[float, int, int, str]:
        rank, own = ranks[name], values[name]
        return (-own[rank] / sum(shapes[name]) if rank < len(own) else 0.0, rank, index, name)

    queue = [entry(index, name) for index, name in enumerate(shapes)]
    heapq.heapify(queue)
    while queue:
        _, rank, index, name = heapq.heappop(queue)
        cost = sum(shapes[name])
        if cost <= left and rank < min(shapes[name]):  # a module that is full, or too dear by now, is done
            ranks[name], left = rank + 1, left - cost
            heapq.heappush(queue, entry(index, name))
    return ranks


def shuffled_ranks(shapes: Shapes, ranks: Mapping[str, int], seed: int = 0) -> dict[str, int]:
    """The same ranks dealt at random among the modules of each cost."""
    generator, dealt = random.Random(seed), {}
    for names in _of_equal_cost(shapes):
        own = [ranks[name] for name in names]
        generator.shuffle(own)
        dealt |= dict(zip(names, own, strict=True))
    return {name: dealt[name] for name in shapes}


def reversed_ranks(shapes: Shapes, ranks: Mapping[str, int]) -> dict[str, int]:
    """The same ranks in reverse: within each cost the module with the largest gets the smallest, and so on."""
    dealt = {}
    for names in _of_equal_cost(shapes):
        rising = sorted(names, key=lambda name: ranks[name])
        dealt |= dict(zip(rising, sorted((ranks[name] for name in names), reverse=True), strict=True))
    return {name: dealt[name] for name in shapes}


def _of_equal_cost(shapes: Shapes) -> Iterable[list[str]]:
    groups = defaultdict(list)
    for name, (out, inp) in shapes.items():
        groups[out + inp, min(out, inp)].append(name)
    return groups.values()


def _uniform(shapes: Shapes, budget: int, method: str) -> dict[str, int]:
    _check(shapes, budget, method, shapes)
    rank, most = 1, max(min(shape) for shape in shapes.values())
    while rank < most and uniform_budget(shapes, rank + 1, method) <= budget:
        rank += 1
    return _capped(shapes, rank)


def _capped(shapes: Shapes, rank: int) -> dict[str, int]:
    return {name: min(rank, *shape) for name, shape in shapes.items()}


def _spent(shapes: Shapes, budget: int, ranks: dict[str, int], order: Sequence[str], method: str) -> dict[str, int]:
    """`ranks` raised by one at a time, in `order` and again, until the rest of the budget raises none."""
    left = budget - adapter_parameters(shapes, ranks, method)
    raised = True
    while raised:
        raised = False
        for name in order:
            cost = sum(shapes[name])
            if cost <= left and ranks[name] < min(shapes[name]):
                ranks[name], left, raised = ranks[name] + 1, left - cost, True
    return ranks


def _check(shapes: Shapes, budget: int, method: str, of_modules: Mapping) -> None:
    """Raise ValueError for scores or values that ranks cannot be made of, or a budget below rank 1."""
    missing = sorted(shapes.keys() ^ of_modules.keys())
    if missing:
        raise ValueError(f"modules and scores are not of the same modules: {missing[:3]} stand in one only")
    for name, scores in of_modules.items():
        if not all(
            math.isfinite(score) and score >= 0 for score in (scores if isinstance(scores, Iterable) else [scores])
        ):
            raise ValueError(f"module {name} has a score that is no finite number of at least 0: measure it again")
    least = uniform_budget(shapes, 1, method)
    if budget < least:
        raise ValueError(
            f"a budget of {budget} parameters does not give rank 1 to all {len(shapes)} modules: that takes {least}; "
            "raise it, or name fewer target modules"
        )
