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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_lab import geometry

METHODS = ("full", "lora", "dora", "dora-magnitude")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how. `lora` and `dora` need a rank and an alpha; the other methods have no low-rank matrices.

    method: `full` (train everything), `lora`, `dora`, `dora-magnitude` (train m only; directions stay W0's).
    dropout: probability, on what the adapter reads; the frozen layer itself always reads all of x.
    target_modules: names of linear layers, matched as PEFT does: the whole name, or all that follows a dot.
    Raises ValueError for values that make no adapter.
    """

    method: str
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = LLAMA_TARGETS

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.method in ("lora", "dora"):
            if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
                raise ValueError(f"rank must be a whole number of at least 1 for {self.method}, got {self.rank!r}")
            if self.alpha is None or not 0 < self.alpha < math.inf:
                raise ValueError(f"alpha must be a number above 0 for {self.method}, got {self.alpha!r}")
        elif self.rank is not None or self.alpha is not None:
            raise ValueError(f"method {self.method!r} has no low-rank matrices: leave rank and alpha out")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError(
                f"target_modules must be a list of layer names such as q_proj, v_proj, got {self.target_modules!r}"
            )
        object.__setattr__(self, "target_modules", tuple(self.target_modules))  # a list from a YAML or JSON file

    @property
    def scaling(self) -> float:
        """s = alpha / rank. Raises ValueError for a method without low-rank matrices."""
        if self.rank is None:
            raise ValueError(f"method {self.method!r} has no low-rank matrices, so no scaling")
        return self.alpha / self.rank


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

    def __init__(self, base: nn.Linear, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scaling, self.dropout = base, config.scaling, nn.Dropout(config.dropout)
        self.lora_A, self.lora_B = _low_rank_pair(base.weight, config.rank, generator)
        self.merged = False
        self.register_buffer("unmerged_weight", None, persistent=False)  # W0 while merged

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)  # (..., out)
        if self.merged:
            return result
        dropped = self.dropout(x.to(self.lora_A.dtype))  # (..., in)
        update = self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., rank) -> (..., out)
        return (result + update).to(result.dtype)

    def effective_weight(self) -> Tensor:
        """W' = W0 + s·B·A, (out, in); while merged, what the base weight holds."""
        if self.merged:
            return self.base.weight.to(self.lora_A.dtype)
        return lora_weight(self.base.weight, self.lora_A, self.lora_B, self.scaling)


class DoRALinear(nn.Module):
    """Eq. 5 without building W': y = g·(x·W0ᵀ + s·x·Aᵀ·Bᵀ) + bias with the gain g = m/‖W0 + s·B·A‖, one per output.

    It is computed as y = (x·W0ᵀ + bias) + (g - 1)·x̃·W0ᵀ + g·s·x̃·Aᵀ·Bᵀ, x̃ = dropout(x), for two reasons: with B = 0 and
    m = ‖W0‖ the base output comes out bit for bit, and dropout then means what it means in NVlabs' code and in PEFT.
    x: (..., in), y: (..., out).
    """

    def __init__(self, base: nn.Linear, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scaling, self.dropout = base, config.scaling, nn.Dropout(config.dropout)
        self.lora_A, self.lora_B = _low_rank_pair(base.weight, config.rank, generator)
        self.magnitude = nn.Parameter(geometry.magnitude(base.weight.detach()))  # (out,)
        self.merged = False
        self.register_buffer("unmerged_weight", None, persistent=False)  # W0 while merged

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)  # (..., out)
        if self.merged:
            return result
        norm = dora_norm(lora_weight(self.base.weight, self.lora_A, self.lora_B, self.scaling))  # (out,), a constant
        gain = self.magnitude / norm  # (out,)
        dropped = self.dropout(x.to(self.lora_A.dtype))  # (..., in)
        update = self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., rank) -> (..., out)
        return (result + (gain - 1) * _base_product(self, result, dropped) + gain * update).to(result.dtype)

    def effective_weight(self) -> Tensor:
        """W' of Eq. 5, (out, in), its row norms |m|; while merged, what the base weight holds."""
        if self.merged:
            return self.base.weight.to(self.lora_A.dtype)
        return dora_weight(self.base.weight, self.magnitude, self.lora_A, self.lora_B, self.scaling)


class MagnitudeLinear(nn.Module):
    """DoRA with B = 0 for good, m alone trained: y = g·x·W0ᵀ + bias, g = m/‖W0‖. x: (..., in), y: (..., out)."""

    def __init__(self, base: nn.Linear, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(config.dropout)
        self.magnitude = nn.Parameter(geometry.magnitude(base.weight.detach()))  # (out,)
        self.merged = False
        self.register_buffer("unmerged_weight", None, persistent=False)  # W0 while merged

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)  # (..., out)
        if self.merged:
            return result
        gain = self.magnitude / dora_norm(self.base.weight)  # (out,)
        dropped = self.dropout(x.to(self.magnitude.dtype))  # (..., in)
        return (result + (gain - 1) * _base_product(self, result, dropped)).to(result.dtype)

    def effective_weight(self) -> Tensor:
        """W' = m · W0 / ‖W0‖, (out, in); while merged, what the base weight holds."""
        if self.merged:
            return self.base.weight.to(self.magnitude.dtype)
        return (self.magnitude / dora_norm(self.base.weight))[:, None] * self.base.weight


Adapter = LoRALinear | DoRALinear | MagnitudeLinear


def attach(model: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> nn.Module:
    """Freeze `model` and put an adapter around every linear layer that `config` names; returns the model, changed.

    The output is the base model's until the first step. Method `full` makes every parameter trainable instead. A CPU
    `generator` with the same seed gives the same adapters on every device. Raises ValueError, naming the module, and
    changes nothing: see `find_targets`; a model that is adapted already.
    """
    if getattr(model, "adapter_config", None) is not None:
        raise ValueError(f"this model is adapted already ({model.adapter_config.method}): load the base model anew")
    targets = find_targets(model, config)
    model.requires_grad_(config.method == "full")
    layer = {"lora": LoRALinear, "dora": DoRALinear, "dora-magnitude": MagnitudeLinear}.get(config.method)
    for name, linear in targets.items():
        model.set_submodule(name, layer(linear, config, generator).train(linear.training))
    model.adapter_config = config
    return model


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Linear]:
    """The linear layers that `config` names, by their names in `model`; none for method `full`.

    Raises ValueError for a target that is not in the model, a module that is no linear layer, and a rank above
    min(in, out).
    """
    if config.method == "full":
        return {}
    found = {}
    for target in config.target_modules:
        matches = {name: m for name, m in model.named_modules() if name == target or name.endswith("." + target)}
        if not matches:
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(f"target module {target!r} is not in the model: its linear layers are {', '.join(linear)}")
        found |= matches
    for name, module in found.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(f"target module {name} is a {type(module).__name__}: only linear layers can be adapted")
        largest = min(module.in_features, module.out_features)
        if config.rank is not None and config.rank > largest:
            raise ValueError(
                f"rank {config.rank} is too large for module {name} ({module.in_features} -> {module.out_features}): "
                f"choose a rank of at most {largest}"
            )
    return {name: module for name, module in model.named_modules() if name in found}  # in the model's own order


def adapted_modules(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in `model`, by the name of the linear layer each of them wraps."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of parameters, shared ones counted once. The paper's "# Params (%)" is their ratio."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Put each adapter's W' into its linear layer, so that a forward costs what the base model's costs.

    W0 is kept beside it for `unmerge`. Raises ValueError if the model has no adapters or they are merged already.
    """
    for module in _adapters_in_state(model, merged=False).values():
        effective_weight = module.effective_weight().to(module.base.weight.dtype)  # (out, in)
        module.unmerged_weight = module.base.weight.data
        module.base.weight.data = effective_weight
        module.merged = True
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take `merge` back: base weights are bit for bit what they were. Raises ValueError if nothing is merged."""
    for module in _adapters_in_state(model, merged=True).values():
        module.base.weight.data = module.unmerged_weight
        module.unmerged_weight = None
        module.merged = False
    return model


def _low_rank_pair(weight: Tensor, rank: int, generator: torch.Generator | None) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) Kaiming-uniform with a=√5, drawn on the CPU, and B (out, rank) zeros, as LoRA starts."""
    out_features, in_features = weight.shape
    options = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
    start = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)
    return nn.Parameter(start.to(**options)), nn.Parameter(torch.zeros(out_features, rank, **options))


def _base_product(module: DoRALinear | MagnitudeLinear, result: Tensor, dropped: Tensor) -> Tensor:
    """x̃·W0ᵀ, (..., out): a second product where dropout made x̃ differ from x, else `result` without its bias."""
    if module.training and module.dropout.p > 0:
        return F.linear(dropped, module.base.weight.to(dropped.dtype))
    return result if module.base.bias is None else result - module.base.bias


def _adapters_in_state(model: nn.Module, merged: bool) -> dict[str, Adapter]:
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters: attach them first")
    if any(module.merged != merged for module in modules.values()):
        raise ValueError("the adapters are not merged" if merged else "the adapters are merged already: unmerge first")
    return modules
