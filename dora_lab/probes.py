"""What training data say of a frozen model's modules: spectra of gradients, of inputs, and of a short full-rank update.

A batch is {"input_ids", "labels"} of shape (rows, longest), padded on the right, as `trainer.collate` makes it: labels
of the prompt and of padding are -100. Every probe leaves the model as it was.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dora_lab.adapter_config import LLAMA_TARGETS, is_named
from dora_lab.kernels import is_linear
from dora_lab.spectra import difference_spectra, singular_values

PEFT_PREFIX = "base_model.model."
LEARNING_RATE = 3e-4  # of the short update, AdamW's

Batch = Mapping[str, Tensor]


def target_linears(model: nn.Module, target_modules: Iterable[str] = LLAMA_TARGETS) -> dict[str, nn.Module]:
    """{name: frozen linear layer} that an adapter would wrap, or wraps already, in a plain model, ours or PEFT's.

    Names are those of the base model: what `rank_pattern` is matched against. Raises ValueError for a target that is
    not in the model or is no linear layer.
    """
    found = {}
    for target in target_modules:
        modules = {name: module for name, module in model.named_modules() if is_named(name, target)}
        if not modules:
            raise ValueError(f"target module {target!r} is not in the model: give names such as q_proj, v_proj")
        for name, module in modules.items():
            linear = getattr(module, "base_layer", None) or getattr(module, "base", None) or module  # PEFT's, or ours
            if not is_linear(linear):
                raise ValueError(f"target module {name} is a {type(module).__name__}: only linear layers have ranks")
            found[name.removeprefix(PEFT_PREFIX)] = linear
    order = [name.removeprefix(PEFT_PREFIX) for name, _ in model.named_modules()]
    return {name: found[name] for name in order if name in found}


def gradient_spectra(
    model: nn.Module,
    batches: Sequence[Batch],
    target_modules: Iterable[str] = LLAMA_TARGETS,
    components: int | None = None,
) -> dict[str, Tensor]:
    """Singular values of the mean gradient ∂L/∂W over the batches, per module: σ² is what a step along it gains.

    components: so many of each, by randomised SVD; all if left out.
    """
    weights = _trainable_weights(model, target_modules)
    with _frozen_but(model, weights.values()):
        gradients = [torch.zeros_like(weight) for weight in weights.values()]
        for batch in batches:
            loss = _loss(model, batch) / len(batches)
            own = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)  # not into .grad: that is
            for total, gradient in zip(gradients, own, strict=True):  # the caller's
                total += gradient
    return {name: singular_values(total, components) for name, total in zip(weights, gradients, strict=True)}


@torch.no_grad()
def activation_spectra(
    model: nn.Module, batches: Sequence[Batch], target_modules: Iterable[str] = LLAMA_TARGETS
) -> dict[str, Tensor]:
    """Square roots of the eigenvalues of the covariance of each module's input x (tokens, in), padding left out.

    Centred and exact over all batches, where EVA (arXiv 2410.07170) updates a truncated SVD batch by batch.
    """
    linears, moments, hooks, seen = target_linears(model, target_modules), {}, [], {}

    def reader(name: str) -> Callable:
        def read(_, inputs):
            x = inputs[0][seen["tokens"]].double()  # (rows, longest, in) -> (tokens, in)
            count, total, squares = moments.get(name, (0, 0.0, 0.0))
            moments[name] = (count + len(x), total + x.sum(0), squares + x.T @ x)

        return read

    with _frozen_but(model, ()):
        try:
            hooks += [linear.register_forward_pre_hook(reader(name)) for name, linear in linears.items()]
            for batch in batches:
                seen["tokens"] = _is_token(batch["labels"])  # (rows, longest)
                _loss(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    spectra = {}
    for name, (count, total, squares) in moments.items():
        covariance = squares / count - torch.outer(total, total) / count**2  # (in, in)
        spectra[name] = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0).sqrt()  # (in,)
    return spectra


def update_spectra(
    model: nn.Module,
    batches: Sequence[Batch],
    target_modules: Iterable[str] = LLAMA_TARGETS,
    components: int | None = None,
    learning_rate: float = LEARNING_RATE,
) -> dict[str, Tensor]:
    """Singular values of ΔW after a short training of the whole target weights: AdamW, a step a batch.

    The training is what an adapter stands in for: the same modules, at full rank. It runs on a copy of the model in
    float32: in 16 bits the weights round most of so small a step away.
    components: so many of each, by randomised SVD; all if left out.
    """
    before = {name: weight.detach().clone() for name, weight in _trainable_weights(model, target_modules).items()}
    trained = copy.deepcopy(model).float()
    weights = _trainable_weights(trained, target_modules)
    with _frozen_but(trained, weights.values()):
        optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=0.0)
        for batch in batches:
            _loss(trained, batch).backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    after = {name: weight.detach() for name, weight in weights.items()}  # float32, as the difference is
    return difference_spectra(before, after, components)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the labelled tokens. Causal attention needs no mask for padding on the right.

    Raises ValueError for a batch without any.
    """
    if not (batch["labels"] >= 0).any():
        raise ValueError("no labelled token in a batch: give examples with answers, cut behind them")
    device = next(model.parameters()).device
    ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def _is_token(labels: Tensor) -> Tensor:
    """(rows, longest) -> the same: whether a place is at or before the last labelled one; behind it is padding."""
    return (labels >= 0).flip(1).cumsum(1).flip(1) > 0


def _trainable_weights(model: nn.Module, target_modules: Iterable[str]) -> dict[str, nn.Parameter]:
    weights = {name: linear.weight for name, linear in target_linears(model, target_modules).items()}
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"module {name} is quantised and has no gradient: load the base in 16 or 32 bits for this")
    return weights


@contextmanager
def _frozen_but(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for `weights` alone and no dropout, for as long as it lasts."""
    state = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in state:
            parameter.requires_grad_(wanted)
        for module, mode in training:
            module.training = mode
