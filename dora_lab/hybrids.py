"""Hybrids: which module trains what, chosen once from gradients before training, at a budget of parameters.

A module's adapter has two parts that can be had apart: m, with one number per output, and the low-rank update, with
rank·(in + out). Neither is frozen, m alone is `dora-magnitude`, the update alone is `lora`, both are `dora`. At the
start (B = 0, m = ‖W0‖) m / ‖W0 + s·B·A‖ is 1 and its norm is held constant, so that the gradient of B is the same with
and without m, and that of A is 0: the parts' gains add up.

The rule: a part is worth Σ|∂L/∂p| over its parameters for every parameter that it adds. AdamW's first step moves each
number by the learning rate against the sign of its gradient, so rate·Σ|∂L/∂p| is by how much the loss falls, to first
order. Parts are taken from the worthiest down while they fit the budget; one that does not fit is passed over.

What it assumes: the first step speaks for the rest; one learning rate for all parts; A, which has no gradient yet, is
worth nothing but must be paid for; parts do not help or hinder each other, though with m the norm takes back what an
update adds along W0 (a few percent of its gain). `shuffled` is the control for all of it.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dora_lab.adapters import AdapterConfig, adapted_modules, attach
from dora_lab.models import answer_loss, load_model, load_tokenizer
from dora_lab.specs import RunSpec

UPDATE, MAGNITUDE = "update", "magnitude"
# Batches of training examples, and draws of A, that a choice rests on; twice the batches change nothing.
BATCHES, DRAWS = 8, (0, 1, 2)
METHOD_OF = {
    frozenset(): "frozen",
    frozenset({MAGNITUDE}): "dora-magnitude",
    frozenset({UPDATE}): "lora",
    frozenset({UPDATE, MAGNITUDE}): "dora",
}


@dataclass(frozen=True)
class Part:
    """What a module may train: its `update` (A and B) or its `magnitude`, at what price, and by how much it promises.

    gain: Σ|∂L/∂p|, in nats per token and unit of learning rate, or a share of all modules' (`pooled`).
    """

    module: str
    kind: str
    parameters: int
    gain: float

    @property
    def worth(self) -> float:
        """Gain for every parameter that is added."""
        return self.gain / self.parameters


def measure_parts(
    model: nn.Module, config: AdapterConfig, batches: Iterable[dict[str, Tensor]], seed: int = 0
) -> list[Part]:
    """The two parts of every target of `config` in a base model that is not adapted yet, with their gains on `batches`.

    DoRA is attached to `model`, with A drawn from `seed`, and its gradient added up over the batches; nothing is
    trained, and the adapters stay attached. batches: as `trainer.collate` makes them, with labels. The gain of an
    update depends on the draw of A: average over several with `pooled`.
    Raises ValueError for a config of another method than dora, no labelled token, or a gain that is not finite.
    """
    if config.method != "dora" or config.method_pattern or config.initialisation != "kaiming":
        raise ValueError("gains are measured with method dora on every target, B = 0: leave method_pattern out")
    attach(model, config, torch.Generator().manual_seed(seed))
    labelled = 0
    for batch in batches:
        loss, count = answer_loss(model, batch)
        loss.backward()  # adds to the gradients so far
        labelled += count
    if not labelled:
        raise ValueError("no labelled token in the batches: give examples with answers")
    parts = []
    for name, module in adapted_modules(model).items():
        update = (module.lora_A, module.lora_B)
        gain = sum(float(p.grad.abs().sum()) for p in update) / labelled
        parts.append(Part(name, UPDATE, sum(p.numel() for p in update), gain))
        gain = float(module.magnitude.grad.abs().sum()) / labelled
        parts.append(Part(name, MAGNITUDE, module.magnitude.numel(), gain))
    for part in parts:
        if not math.isfinite(part.gain):
            raise ValueError(f"the gain of {part.module}'s {part.kind} is {part.gain}: load the base in float32")
    return parts


def measure_run(spec: RunSpec, batches: int = BATCHES, draws: Sequence[int] = DRAWS) -> list[Part]:
    """The parts of one task's run, gains on its first training examples, `pooled` over several draws of A."""
    from dora_lab.data import load_examples, tokenized  # these load datasets and the Trainer
    from dora_lab.trainer import collate

    examples = load_examples(spec.data, spec.task, "train", spec.train_examples, spec.validation_examples)
    tokenizer = load_tokenizer(spec.base_model, spec.revision, spec.tokenizer)
    shown = examples[: batches * spec.batch_size]
    cutoff = None if spec.cutoff_tokens == "auto" else spec.cutoff_tokens
    rows = list(tokenized(tokenizer, shown, spec.prompt, spec.append_eos, cutoff, spec.train_on_prompt, spec.cut)[0])
    collated = [collate(rows[i : i + spec.batch_size]) for i in range(0, len(rows), spec.batch_size)]
    return pooled(
        [
            measure_parts(
                load_model(spec.base_model, spec.dtype, "cpu", spec.revision), spec.adapter_config, collated, a
            )
            for a in draws
        ]
    )


def pooled(measured: Sequence[Sequence[Part]]) -> list[Part]:
    """One list from those of several tasks or draws of A: each part's share of its list's total gain, averaged.

    For a choice that has to serve all of them. Raises ValueError if the lists are not of the same parts, or one has no
    gain at all.
    """
    if len({tuple((p.module, p.kind, p.parameters) for p in parts) for parts in measured}) != 1:
        raise ValueError("the lists are not of the same parts: measure them on the same model with the same config")
    totals = [sum(part.gain for part in parts) for parts in measured]
    if not all(totals):
        raise ValueError("the parts of a list have no gain: its batches give no gradient, take others")
    return [
        replace(same[0], gain=sum(p.gain / total for p, total in zip(same, totals, strict=True)) / len(totals))
        for same in zip(*measured, strict=True)
    ]


def choose_methods(parts: Sequence[Part], budget: int) -> dict[str, str]:
    """{module: method} by the rule at the head of this file, for `method_pattern`; never above `budget` parameters.

    No part that was left out would still fit. Ties go to the part that comes first. Raises ValueError for a budget that
    no part fits.
    """
    taken, left = defaultdict(set), budget
    for part in sorted(parts, key=lambda part: -part.worth):
        if part.parameters <= left:
            taken[part.module].add(part.kind)
            left -= part.parameters
    if not taken:
        cheapest = min(part.parameters for part in parts)
        raise ValueError(f"a budget of {budget} parameters buys nothing: the cheapest part has {cheapest}")
    return {part.module: METHOD_OF[frozenset(taken[part.module])] for part in parts}


def shuffled(methods: Mapping[str, str], parts: Sequence[Part], seed: int) -> dict[str, str]:
    """The same methods dealt to other modules, as a control: those of modules of one size change places among them.

    So every method is as frequent as before, and the number of parameters is the same to the last one.
    """
    sizes, alike = defaultdict(dict), defaultdict(list)
    for part in parts:
        sizes[part.module][part.kind] = part.parameters
    for module, size in sizes.items():
        alike[tuple(sorted(size.items()))].append(module)
    generator, dealt = random.Random(seed), {}
    for modules in alike.values():
        places = generator.sample(modules, len(modules))
        dealt |= {module: methods[place] for module, place in zip(modules, places, strict=True)}
    return {module: dealt[module] for module in methods}


def budget_of_rank_1(parts: Sequence[Part], rank: int) -> int:
    """What DoRA of rank 1 trains on all modules; `parts` were measured at `rank`."""
    return sum(part.parameters // rank if part.kind == UPDATE else part.parameters for part in parts)


def parameters_of(methods: Mapping[str, str], parts: Sequence[Part]) -> int:
    """How many parameters a choice of methods trains."""
    kinds = {method: kinds for kinds, method in METHOD_OF.items()}
    return sum(part.parameters for part in parts if part.kind in kinds[methods[part.module]])
