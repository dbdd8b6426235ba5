"""LoRA and DoRA, written to be read.

          ┌───────────── W0 (out, in), frozen ──────────────┐
      x ──┤                                                 ├─ + ── · m / ‖W0 + s·B·A‖ (DoRA only) ── + bias ── y
          └─ dropout ─ A (rank, in) ─ B (out, rank) ─ · s ──┘

LoRA (arXiv 2106.09685):           W' = W0 + s·B·A,  s = alpha / rank
DoRA (arXiv 2402.09353, Eq. 5):    W' = m · (W0 + s·B·A) / ‖W0 + s·B·A‖

The paper writes W as (in, out) and takes the norm "column-wise"; PyTorch keeps (out, in), so here the norm is over
`dim=1`: one norm and one entry of m per output feature. For 4096 -> 4096 at rank 16, A and B have 131,072 numbers
together, m adds 4,096, and W0 has 16,777,216. Adapter parameters are float32 (float64 around a float64 layer).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_lab import geometry
from dora_lab.adapter_config import LLAMA_TARGETS, METHODS, AdapterConfig, fits_pattern, is_named
from dora_lab.kernels import (
    NormCache,
    dora_correction,
    dora_product,
    features_of,
    is_fresh,
    is_linear,
    replace_weight,
    weight_of,
    without_bias,
)
from dora_lab.pissa import check_can_be_split, split_weight

__all__ = [
    "LLAMA_TARGETS",
    "METHODS",
    "Adapter",
    "AdapterConfig",
    "DoRALinear",
    "LoRALinear",
    "MagnitudeLinear",
    "adapted_modules",
    "attach",
    "dora_norm",
    "dora_weight",
    "find_targets",
    "initial_weight",
    "lora_weight",
    "merge",
    "trainable_parameters",
    "unmerge",
]


def lora_weight(base_weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W0 + s·B·A, (out, in), in the precision of A and B, under autocast too."""
    with torch.autocast(base_weight.device.type, enabled=False):
        return base_weight.to(lora_A.dtype) + scaling * (lora_B @ lora_A)  # (out, in)


def dora_norm(weight: Tensor, detach: bool = True) -> Tensor:
    """‖V'‖ of V' = W0 + s·B·A for every output feature: (out, in) -> (out,). A row of zeros gets 1, so that 0 / 1 = 0.

    Sec. 4.3: the norm follows the update but is held constant in the backward pass. Differentiating it gives Eq. 6,
    ∇V' = m/‖V'‖ (I - V'V'ᵀ/‖V'‖²) ∇W'; holding it constant leaves Eq. 11, ∇V' = m/‖V'‖ ∇W', and saves the memory that
    the norm's own backward would need. `detach=False` is here to see the difference; the layers never use it.
    """
    norm = geometry.magnitude(weight.detach() if detach else weight)  # (out,)
    return torch.where(norm == 0, 1.0, norm)


def dora_weight(
    base_weight: Tensor, magnitude: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, detach_norm: bool = True
) -> Tensor:
    """Eq. 5 as it stands: W' = m · V' / ‖V'‖ with V' = W0 + s·B·A, (out, in). Its row norms are |m|."""
    adapted = lora_weight(base_weight, lora_A, lora_B, scaling)  # (out, in)
    return (magnitude / dora_norm(adapted, detach_norm))[:, None] * adapted  # (out, in)


class LoRALinear(nn.Module):
    """y = x·W0ᵀ + bias + s·x̃·Aᵀ·Bᵀ around a frozen linear layer, x̃ = dropout(x). x: (..., in), y: (..., out)."""

    def __init__(self, base: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scaling, self.dropout = base, config.scaling, nn.Dropout(config.dropout)
        _start_low_rank(self, config, generator)
        self.merged = False
        self.register_buffer("unmerged_weight", None, persistent=False)  # W0 while merged

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)  # (..., out)
        if self.merged:
            return result
        hidden = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., in) -> (..., rank)
        return (result + F.linear(hidden, self.scaling * self.lora_B)).to(result.dtype)  # (..., rank) -> (..., out)

    def effective_weight(self) -> Tensor:
        """W' = W0 + s·B·A, (out, in); while merged, what the base weight holds."""
        if self.merged:
            return weight_of(self.base).to(self.lora_A.dtype)
        return lora_weight(weight_of(self.base), self.lora_A, self.lora_B, self.scaling)


class DoRALinear(nn.Module):
    """Eq. 5 without building W': y = g·(x·W0ᵀ + s·x·Aᵀ·Bᵀ) + bias with the gain g = m/‖W0 + s·B·A‖, one per output.

    x: (..., in), y: (..., out). Where dropout acts is `config.dropout_on`, x̃ = dropout(x):

    "low-rank" (the default)    y = g·(x·W0ᵀ + s·x̃·Aᵀ·Bᵀ) + bias. One product with W0.
    "faithful"                  y = (x·W0ᵀ + bias) + (g - 1)·x̃·W0ᵀ + g·s·x̃·Aᵀ·Bᵀ. Two products with W0 while training.

    NVlabs' code and PEFT are "faithful", so the paper's tables and everything trained with PEFT used that one. Without
    dropout and in evaluation the two are the same. `kernel` "fast" is `kernels.dora_product` with its kept norm,
    "reference" is `reference` below, line for line the formula.
    """

    def __init__(self, base: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scaling, self.dropout = base, config.scaling, nn.Dropout(config.dropout)
        self.faithful, self.fast = config.dropout_on == "faithful", config.kernel == "fast"
        magnitude = geometry.magnitude(weight_of(base))  # (out,): ‖W0‖, before PiSSA takes anything out
        _start_low_rank(self, config, generator)
        self.magnitude = nn.Parameter(magnitude.to(self.lora_A.dtype))  # (out,)
        self.cache = NormCache()
        self.merged = False
        self.register_buffer("unmerged_weight", None, persistent=False)  # W0 while merged

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)  # (..., out)
        if self.merged:
            return result
        dropped = self.dropout(x.to(self.lora_A.dtype))  # (..., in)
        if not self.fast:
            norm = dora_norm(lora_weight(weight_of(self.base), self.lora_A, self.lora_B, self.scaling))  # (out,)
            return self.reference(result, dropped, norm)
        norm = self.cache.norm(self.base, self.lora_A, self.lora_B, self.scaling)  # (out,), a constant
        if torch.compiler.is_compiling():
            return self.reference(result, dropped, norm)
        hidden = F.linear(dropped, self.lora_A)  # (..., rank)
        if self.faithful and self.training and self.dropout.p > 0:
            gain = self.magnitude / norm  # (out,)
            return dora_correction(self.base, result, dropped, hidden, self.lora_B, gain, self.scaling)
        zeros = self.cache.zero_rows(self.magnitude)
        return dora_product(
            result, hidden, self.lora_B, self.magnitude, norm, self.scaling, self.base.bias, zeros, is_fresh(self.base)
        )

    def reference(self, result: Tensor, dropped: Tensor, norm: Tensor) -> Tensor:
        """y from result = x·W0ᵀ + bias (..., out), x̃ (..., in) and the norm (out,), by plain autograd.

        Written as a correction of `result`: with B = 0 and m = ‖W0‖ the base output comes out bit for bit.
        """
        gain = self.magnitude / norm  # (out,)
        base_product = result if self.base.bias is None else result - self.base.bias  # (..., out)
        if self.faithful and self.training and self.dropout.p > 0:
            base_product = without_bias(self.base, dropped.to(result.dtype))  # (..., out): x̃·W0ᵀ
        update = self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., rank) -> (..., out)
        return (result + (gain - 1) * base_product + gain * update).to(result.dtype)

    def effective_weight(self) -> Tensor:
        """W' of Eq. 5, (out, in), its row norms |m|; while merged, what the base weight holds."""
        if self.merged:
            return weight_of(self.base).to(self.lora_A.dtype)
        return dora_weight(weight_of(self.base), self.magnitude, self.lora_A, self.lora_B, self.scaling)


class MagnitudeLinear(nn.Module):
    """DoRA with B = 0 for good, m alone trained: y = g·x·W0ᵀ + bias, g = m/‖W0‖. x: (..., in), y: (..., out).

    Dropout acts under `dropout_on="faithful"` only: there is no low-rank path. See `DoRALinear`.
    """

    def __init__(self, base: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(config.dropout if config.dropout_on == "faithful" else 0.0)
        self.magnitude = nn.Parameter(geometry.magnitude(weight_of(base)))  # (out,)
        self.cache = NormCache()
        self.merged = False
        self.register_buffer("unmerged_weight", None, persistent=False)  # W0 while merged

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)  # (..., out)
        if self.merged:
            return result
        gain = self.magnitude / self.cache.norm(self.base, None, None, 1.0)  # (out,)
        if self.training and self.dropout.p > 0:
            base_product = without_bias(self.base, self.dropout(x))  # (..., out)
        else:
            base_product = result if self.base.bias is None else result - self.base.bias  # (..., out)
        return (result + (gain - 1) * base_product).to(result.dtype)

    def effective_weight(self) -> Tensor:
        """W' = m · W0 / ‖W0‖, (out, in); while merged, what the base weight holds."""
        weight = weight_of(self.base).to(self.magnitude.dtype)
        return weight if self.merged else (self.magnitude / dora_norm(weight))[:, None] * weight


Adapter = LoRALinear | DoRALinear | MagnitudeLinear


def attach(model: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> nn.Module:
    """Freeze `model` and put an adapter around every linear layer that `config` names; returns the model, changed.

    nn.Linear, GPT-2's Conv1D, and bitsandbytes' Linear8bitLt and Linear4bit can be adapted.
    The output is the base model's until the first step; with PiSSA up to rounding, as A and B are then taken out of the
    base's weights. A target that `method_pattern` calls frozen gets no adapter. Method `full` makes every parameter
    trainable instead. A CPU `generator` with the same seed gives the same adapters on every device. Raises ValueError,
    naming the module, and changes nothing: see `find_targets`; a model that is adapted already.
    """
    if getattr(model, "adapter_config", None) is not None:
        raise ValueError(f"this model is adapted already ({model.adapter_config.method}): load the base model anew")
    targets = find_targets(model, config)
    model.requires_grad_(config.method == "full")
    layers = {"lora": LoRALinear, "dora": DoRALinear, "dora-magnitude": MagnitudeLinear}
    for name, linear in targets.items():
        own = config.of_module(name)
        model.set_submodule(name, layers[own.method](linear, own, generator).train(linear.training))
    model.adapter_config = config
    return model


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The linear layers that `config` names, by their names in `model`; none for method `full`.

    Targets that `method_pattern` leaves frozen are not among them.
    Raises ValueError for a target that is not in the model, a key of `method_pattern` that fits no target, a module
    that is no linear layer or is an adapter's, a rank above min(in, out), and PiSSA on what it cannot split.
    """
    if config.method == "full":
        return {}
    modules, found = dict(model.named_modules()), {}
    for target in config.target_modules:
        matches = {name: module for name, module in modules.items() if is_named(name, target)}
        if not matches:
            linear = sorted({name.rpartition(".")[2] for name, module in modules.items() if is_linear(module)})
            raise ValueError(f"target module {target!r} is not in the model: its linear layers are {', '.join(linear)}")
        found |= matches
    for pattern in ("method_pattern", "rank_pattern", "alpha_pattern"):
        for key in getattr(config, pattern):
            if not any(fits_pattern(name, key) for name in found):
                raise ValueError(f"{pattern} names {key!r}, which is not among the target modules: add it to them")
    found = {name: module for name, module in found.items() if config.of_module(name) is not None}
    if not found:
        raise ValueError("method_pattern leaves every target module frozen: give one of them a method that trains")
    for name, module in found.items():
        if isinstance(module, Adapter):
            raise ValueError(f"target module {name} is adapted already: load the base model anew")
        if not is_linear(module):
            raise ValueError(f"target module {name} is a {type(module).__name__}: only linear layers can be adapted")
        out_features, in_features = features_of(module)
        own, largest = config.of_module(name), min(in_features, out_features)
        rank = own.rank
        if rank is not None and rank > largest:
            raise ValueError(
                f"rank {rank} is too large for module {name} ({in_features} -> {out_features}): "
                f"choose a rank of at most {largest}"
            )
        if own.initialisation == "pissa":
            check_can_be_split(name, module, rank)
    return {name: module for name, module in modules.items() if name in found}  # in the model's own order


def adapted_modules(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in `model`, by the name of the linear layer each of them wraps."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of parameters, shared ones counted once. The paper's "# Params (%)" is their ratio."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Put each adapter's W' into its linear layer, so that a forward costs what the base model's costs.

    W' is made in float32 and rounded to the layer's precision; W0 is kept beside it for `unmerge`. A weight that is
    shared with another layer, an embedding say, stays W0 there. Raises ValueError,
    and changes nothing, if the model has no adapters, they are merged already, or a layer is quantised: W' put back
    into 4 or 8 bits would lose most of what was learned to rounding.
    """
    modules = _adapters_in_state(model, merged=False)
    for name, module in modules.items():
        if not module.base.weight.is_floating_point():
            raise ValueError(
                f"module {name} is quantised ({type(module.base).__name__}): merging would round the adapter away with "
                "the weight; leave it unmerged, or load the base in 16 or 32 bits and load the adapter into that"
            )
    for module in modules.values():
        merged = module.effective_weight().to(module.base.weight.dtype)  # (out, in)
        module.unmerged_weight = module.base.weight.data
        module.unmerged = [module.base.weight]  # in a list: while merged it is no parameter of the layer
        replace_weight(module.base, merged)
        _set_merged(module, True)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take `merge` back: base weights are bit for bit what they were, shared ones shared again.

    Raises ValueError if nothing is merged.
    """
    for module in _adapters_in_state(model, merged=True).values():
        module.base.weight = module.unmerged.pop()
        module.base.weight.data = module.unmerged_weight  # which has moved with the model since, if it did
        module.unmerged_weight = None
        _set_merged(module, False)
    return model


def _set_merged(module: Adapter, merged: bool) -> None:
    module.merged = merged
    if hasattr(module, "cache"):
        module.cache.forget()


def initial_weight(module: Adapter) -> Tensor:
    """W0 (out, in) as it was before `attach`, of an adapter that is not merged; with PiSSA up to rounding."""
    weight = weight_of(module.base)
    if getattr(module, "start_A", None) is None:
        return weight
    return lora_weight(weight, module.start_A, module.start_B, module.scaling)


def _start_low_rank(module: nn.Module, config: AdapterConfig, generator: torch.Generator | None) -> None:
    """Give `module` its A (rank, in) and B (out, rank), and PiSSA's first A and B as `start_A` and `start_B`.

    As LoRA starts: A Kaiming-uniform with a=√5, drawn on the CPU, and B zeros.
    """
    base = module.base
    out_features, in_features = features_of(base)
    double = base.weight.dtype == torch.float64
    options = {"device": base.weight.device, "dtype": torch.float64 if double else torch.float32}
    pissa = config.initialisation == "pissa"
    if pissa:
        lora_A, lora_B = (start.to(**options) for start in split_weight(base, config.rank, config.scaling))
    else:
        start = nn.init.kaiming_uniform_(torch.empty(config.rank, in_features), a=math.sqrt(5), generator=generator)
        lora_A, lora_B = start.to(**options), torch.zeros(out_features, config.rank, **options)
    module.lora_A, module.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
    module.register_buffer("start_A", lora_A.clone() if pissa else None, persistent=False)
    module.register_buffer("start_B", lora_B.clone() if pissa else None, persistent=False)


def _adapters_in_state(model: nn.Module, merged: bool) -> dict[str, Adapter]:
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters: attach them first")
    if any(module.merged != merged for module in modules.values()):
        raise ValueError("the adapters are not merged" if merged else "the adapters are merged already: unmerge first")
    return modules
