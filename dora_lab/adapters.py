"""LoRA and DoRA, written to be read.

            x ──┬───────────── W0 (out, in), frozen ──────────────┐
                │                                                 ├─ + ─ (· m / ‖W0 + s·B·A‖ for DoRA) ─ + bias ── y
                └─ dropout ─ A (rank, in) ─ B (out, rank) ─ · s ──┘

LoRA (arXiv 2106.09685):  W' = W0 + s·B·A,  s = alpha / rank.
DoRA (arXiv 2402.09353, Eq. 5):  W' = m · (W0 + s·B·A) / ‖W0 + s·B·A‖, one norm and one m per output feature. The paper
writes W as (in, out) and says "column-wise"; PyTorch keeps (out, in), so the norm is over `dim=1` and m is (out,).
For 4096 -> 4096 at rank 16: A and B have 131,072 numbers, m adds 4,096, W0 has 16,777,216.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_lab.geometry import magnitude

METHODS = ("full", "lora", "dora", "dora-magnitude")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how. rank and alpha are for `lora` and `dora`; the other methods have no low-rank matrices.

    method: `full` (train everything), `lora`, `dora`, `dora-magnitude` (train m only, directions stay W0's).
    target_modules: names of linear layers, matched as PEFT does: the whole name or what follows a dot.
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
            if self.rank is None or self.rank < 1:
                raise ValueError(f"rank must be a whole number of at least 1 for {self.method}, got {self.rank!r}")
            if self.alpha is None or self.alpha <= 0:
                raise ValueError(f"alpha must be above 0 for {self.method}, got {self.alpha!r}")
        elif self.rank is not None or self.alpha is not None:
            raise ValueError(f"method {self.method!r} has no low-rank matrices: leave rank and alpha out")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name the linear layers to adapt, such as q_proj")

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank


def dora_norm(weight: Tensor) -> Tensor:
    """‖W0 + s·B·A‖ per output feature, (out, in) -> (out,), held constant in the backward pass (Sec. 4.3, Eq. 11).

    Were the norm differentiated, Eq. 6 would hold: ∇V' = m/‖V'‖ (I - V'V'ᵀ/‖V'‖²) ∇W'. Held constant it is
    Eq. 11: ∇V' = m/‖V'‖ ∇W', and no (out, in) tensor need be kept for it. Rows of zeros get norm 1: their product is 0.
    """
    norm = magnitude(weight.detach())  # (out,)
    return torch.where(norm == 0, 1.0, norm)


class LoRALinear(nn.Module):
    """y = x·W0ᵀ + s·dropout(x)·Aᵀ·Bᵀ + bias around a frozen linear layer. x: (..., in), y: (..., out)."""

    def __init__(self, base: nn.Linear, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.scaling, self.merged = base, config.scaling, False
        self.dropout = nn.Dropout(config.dropout)
        options = {"device": base.weight.device, "dtype": torch.float32}
        start = torch.empty(config.rank, base.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(start.to(**options))  # (rank, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, **options))  # (out, rank)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        dropped = self.dropout(x.to(self.lora_A.dtype))
        update = self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., out)
        return (self.base(x) + update).to(x.dtype)

    def effective_weight(self) -> Tensor:
        """W0 + s·B·A in float32, (out, in)."""
        return self.base.weight.float() + self.scaling * (self.lora_B @ self.lora_A)


class DoRALinear(LoRALinear):
    """Eq. 5 in output form: y = g·(x·W0ᵀ + s·x·Aᵀ·Bᵀ) + bias with g = m/‖W0 + s·B·A‖, so W' is never built.

    Dropout as in NVlabs' code and PEFT: with x̃ = dropout(x), y = x·W0ᵀ + (g - 1)·x̃·W0ᵀ + g·s·x̃·Aᵀ·Bᵀ + bias.
    """

    def __init__(self, base: nn.Linear, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__(base, config, generator)
        self.magnitude = nn.Parameter(magnitude(base.weight.detach()))  # (out,): at the start W' = W0

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        weight, bias = self.base.weight, self.base.bias
        with torch.no_grad():
            norm = dora_norm(super().effective_weight())  # (out,)
        gain = self.magnitude / norm  # (out,)
        product = F.linear(x, weight)  # (..., out)
        dropped = self.dropout(x.to(self.lora_A.dtype))
        update = self.scaling * F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., out)
        if self.training and self.dropout.p > 0:
            again = F.linear(dropped.to(weight.dtype), weight)  # (..., out): the product of what dropout left of x
            y = product + (gain - 1) * again + gain * update
        else:
            y = gain * (product + update)
        return (y if bias is None else y + bias).to(x.dtype)

    def effective_weight(self) -> Tensor:
        """W' of Eq. 5 in float32, (out, in); its row norms are |m|."""
        adapted = super().effective_weight()
        return (self.magnitude / dora_norm(adapted))[:, None] * adapted


class MagnitudeLinear(nn.Module):
    """DoRA with m alone trained: y = (m/‖W0‖)·x·W0ᵀ + bias. x: (..., in), y: (..., out)."""

    def __init__(self, base: nn.Linear, config: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.merged = base, False
        self.register_buffer("norm", dora_norm(base.weight), persistent=False)  # (out,)
        self.magnitude = nn.Parameter(magnitude(base.weight.detach()))  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        y = (self.magnitude / self.norm) * F.linear(x, self.base.weight)  # (..., out)
        return (y if self.base.bias is None else y + self.base.bias).to(x.dtype)

    def effective_weight(self) -> Tensor:
        """m·W0/‖W0‖ in float32, (out, in)."""
        return (self.magnitude / self.norm)[:, None] * self.base.weight.float()


Adapter = LoRALinear | MagnitudeLinear
_LAYER: dict[str, Callable] = {"lora": LoRALinear, "dora": DoRALinear, "dora-magnitude": MagnitudeLinear}


def attach(model: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> nn.Module:
    """Freeze `model` and put an adapter around every linear layer that `config` names; returns the model, changed.

    The output stays the same until the first step. Method `full` makes every parameter trainable instead. The same
    `generator` seed gives the same adapters. Raises ValueError, naming the module: a target that is not there or not a
    linear layer, a rank above min(in, out), a model that has adapters already. Then nothing is changed.
    """
    if getattr(model, "adapter_config", None) is not None:
        raise ValueError(f"this model is adapted already ({model.adapter_config.method}): load the base model anew")
    if config.method == "full":
        model.requires_grad_(True)
        model.adapter_config = config
        return model
    names = [name for name, _ in model.named_modules()]
    for target in config.target_modules:
        if not any(_matches(name, target) for name in names):
            linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(f"target module {target!r} is not in the model: its linear layers are {', '.join(linear)}")
    found = {
        name: module for name, module in model.named_modules() if any(_matches(name, t) for t in config.target_modules)
    }
    for name, module in found.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(f"target module {name} is a {type(module).__name__}: only nn.Linear can be adapted")
        if config.rank is not None and config.rank > min(module.weight.shape):
            out_features, in_features = module.weight.shape
            raise ValueError(
                f"rank {config.rank} is larger than module {name} ({out_features} x {in_features}) allows: "
                f"choose a rank of at most {min(module.weight.shape)}"
            )
    model.requires_grad_(False)
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _LAYER[config.method](module, config, generator))
    model.adapter_config = config
    return model


def adapted_modules(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in a model by the name of the layer they wrap."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear | MagnitudeLinear)}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, each counted once. The paper's percentages are trainable / all."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Write each adapter's W' into its base weight, so that inference costs what the base model costs.

    The base weight is kept aside for `unmerge`. Raises ValueError if there is nothing to merge or it is merged already.
    """
    for module in _in_state(model, merged=False).values():
        module.kept_weight = module.base.weight.data.clone()
        module.base.weight.data = module.effective_weight().to(module.base.weight.dtype)
        module.merged = True
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Take `merge` back; the base weights are bit for bit what they were. Raises ValueError if nothing is merged."""
    for module in _in_state(model, merged=True).values():
        module.base.weight.data = module.kept_weight
        del module.kept_weight
        module.merged = False
    return model


def _in_state(model: nn.Module, merged: bool) -> dict[str, Adapter]:
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters: attach them first")
    if any(module.merged != merged for module in modules.values()):
        raise ValueError("the adapters are not merged" if merged else "the adapters are merged already: unmerge first")
    return modules


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
