"""Exercises of chapter 04: counting what is trained, and what is saved."""

import torch
from torch import nn

from dora_lab.adapters import AdapterConfig, attach, trainable_parameters
from dora_lab.exercises.engine import Exercise, Malformed, Misconception, function

SHAPES, RANK = ((64, 48), (176, 64), (64, 176)), 4  # (out, in)
KNOWN = ("weight", "lora_A", "lora_B", "magnitude", "norm")


def _model(shapes, rank):
    """A DoRA model of these layers, without memory."""
    with torch.device("meta"):
        layers = [nn.Linear(in_features, out_features, bias=False) for out_features, in_features in shapes]
        model = nn.ModuleList(layers)
    config = AdapterConfig("dora", rank=rank, alpha=1.0, target_modules=tuple(str(i) for i in range(len(shapes))))
    return attach(model, config, torch.Generator())


def _observe_count(answer):
    return tuple(function(answer, "shapes, rank")(list(SHAPES[:n]), RANK) for n in (1, 3))


def _expected_count():
    return tuple(trainable_parameters(_model(SHAPES[:n], RANK))[0] for n in (1, 3))


def _wrong_count(of_layer):
    return lambda shapes, rank: sum(of_layer(out, inside, rank) for out, inside in shapes)


def _parts():
    """(trainable, base) numbers of two adapted models."""
    for n in (1, 3):
        trainable, total = trainable_parameters(_model(SHAPES[:n], RANK))
        yield trainable, total - trainable


def _expected_percentage():
    counts = (trainable_parameters(_model(SHAPES[:n], RANK)) for n in (1, 3))
    return tuple(100 * trainable / total for trainable, total in counts)


def _observe_names(answer):
    if isinstance(answer, str) or not isinstance(answer, set | frozenset | list | tuple):
        raise Malformed(f"Give a set of names out of {', '.join(KNOWN)}.")
    unknown = sorted({str(name) for name in answer} - set(KNOWN))
    if unknown:
        raise Malformed(f"Unknown names {', '.join(unknown)}: choose out of {', '.join(KNOWN)}.")
    return set(answer)


def _expected_names():
    model = _model(SHAPES[:1], RANK)
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


EXERCISES = (
    Exercise(
        id="04.1",
        question="Write a function (shapes, rank) that counts what DoRA trains on layers of these (out, in) shapes.",
        observe=_observe_count,
        expected=_expected_count,
        misconceptions=(
            Misconception(
                "m not counted",
                _wrong_count(lambda out, inside, rank: rank * (out + inside)),
                "This is what LoRA trains. DoRA trains one thing more in each layer.",
            ),
            Misconception(
                "m along the wrong axis",
                _wrong_count(lambda out, inside, rank: rank * (out + inside) + inside),
                "You counted one magnitude for each input feature. The layers are not square, so it matters.",
            ),
            Misconception(
                "m per layer instead of per output feature",
                _wrong_count(lambda out, inside, rank: rank * (out + inside) + 1),
                "One magnitude a layer is too few.",
            ),
            Misconception(
                "only one factor",
                _wrong_count(lambda out, inside, rank: rank * inside + out),
                "There are two low-rank factors, one at the inputs and one at the outputs.",
            ),
            Misconception(
                "only B counted",
                _wrong_count(lambda out, inside, rank: rank * out + out),
                "There are two low-rank factors, one at the inputs and one at the outputs.",
            ),
            Misconception(
                "m counted once a rank",
                _wrong_count(lambda out, inside, rank: rank * (out + inside) + rank * out),
                "The magnitudes do not depend on the rank: there are equally many at any rank.",
            ),
            Misconception(
                "base weight counted",
                _wrong_count(lambda out, inside, rank: out * inside + rank * (out + inside) + out),
                "The base weights are frozen.",
            ),
        ),
        hints=(
            "LoRA's count first, layer by layer; then what DoRA adds.",
            "How many entries has m in a layer that maps 48 features to 64?",
        ),
    ),
    Exercise(
        id="04.2",
        question="Write a function (trainable, base) that gives the paper's percentage of trainable parameters.",
        observe=lambda answer: tuple(function(answer, "trainable, base")(*parts) for parts in _parts()),
        expected=_expected_percentage,
        misconceptions=(
            Misconception(
                "of the base model",
                lambda trainable, base: 100 * trainable / base,
                "The percentage is of the adapted model's total, and the adapters are part of that model.",
            ),
            Misconception(
                "share instead of percent",
                lambda trainable, base: trainable / (base + trainable),
                "This is a share between 0 and 1. The paper's column is in percent.",
            ),
            Misconception(
                "what is saved instead of what is trained",
                lambda trainable, base: 100 * base / (base + trainable),
                "This is the frozen part.",
            ),
            Misconception(
                "adapters taken off",
                lambda trainable, base: 100 * trainable / (base - trainable),
                "The adapters are added beside the frozen weights; nothing is taken away from them.",
            ),
        ),
        hints=("Percent of what? Think of the model that is in memory while it trains.", "The base count is frozen."),
    ),
    Exercise(
        id="04.3",
        question=f"Which of {', '.join(KNOWN)} does a saved DoRA adapter hold? Give a set of names.",
        observe=_observe_names,
        expected=_expected_names,
        misconceptions=(
            Misconception(
                "m forgotten", {"lora_A", "lora_B"}, "With these alone the lengths of the rows could not be restored."
            ),
            Misconception(
                "norm saved",
                {"lora_A", "lora_B", "magnitude", "norm"},
                "One of these follows from the others and the base weight, so there is no need to store it.",
            ),
            Misconception(
                "base weight saved",
                {"weight", "lora_A", "lora_B", "magnitude"},
                "An adapter file is small because the part that did not change is not in it.",
            ),
            Misconception(
                "everything saved", set(KNOWN), "A file with all of this would be larger than the base model's."
            ),
            Misconception("only m saved", {"magnitude"}, "The directions were trained too."),
        ),
        hints=("What changed in training?", "What can be computed again when the adapter is opened beside its base?"),
    ),
)
