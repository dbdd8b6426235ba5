"""The fast product under a PEFT model that exists: `speed_up(model)`, and `slow_down(model)` to undo it.

PEFT gives each DoRA layer a "variant" that computes its forward. Only that is exchanged: parameters, adapter files,
merging, several adapters and everything else remain PEFT's.
"""

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn import functional as F

from dora_lab.adapter_config import DROPOUTS
from dora_lab.kernels import NormCache, dora_correction, dora_product


class FastDora(DoraLinearVariant):
    """PEFT's DoRA of one linear layer with the norm kept between forwards and a lean backward."""

    def __init__(self, dropout_on: str):
        self.cache, self.dropout_on = NormCache(), dropout_on

    def forward(self, module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        """The adapted output (..., out) from x (..., in) and result = x·W0ᵀ + bias (..., out)."""
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        magnitude, scaling = module.lora_magnitude_vector[active_adapter].weight, module.scaling[active_adapter]
        dropout, base = module.lora_dropout[active_adapter], module.get_base_layer()
        norm = self.cache.norm(base, A, B, scaling).to(magnitude.dtype)  # (out,), a constant
        dropped = dropout(x)  # (..., in)
        hidden = F.linear(dropped, A)  # (..., rank)
        if self.dropout_on == "faithful" and module.training and not isinstance(dropout, nn.Identity):
            return dora_correction(base, result, dropped, hidden, B, magnitude / norm, scaling)
        zeros = self.cache.zero_rows(magnitude)
        return dora_product(result, hidden, B, magnitude, norm, scaling, base.bias, zeros)


def speed_up(model: nn.Module, dropout_on: str = "faithful") -> nn.Module:
    """Put the fast DoRA product under every DoRA linear layer of a PEFT model; returns the model, changed in place.

    Adapter files stay the same to the bit, and so do outputs up to rounding. With dropout in training "faithful" is
    PEFT's own meaning and needs a second product with W0; "low-rank" drops the low-rank path alone and is faster: see
    `adapters.DoRALinear`. Raises ValueError if the model has no DoRA linear layer, or dropout_on is neither.
    """
    if dropout_on not in DROPOUTS:
        raise ValueError(f"unknown dropout_on {dropout_on!r}: choose {' or '.join(DROPOUTS)}")
    found = _exchange(model, DoraLinearVariant, lambda: FastDora(dropout_on))
    if not found:
        raise ValueError("the model has no PEFT DoRA layer to speed up: make it with LoraConfig(use_dora=True)")
    return model


def slow_down(model: nn.Module) -> nn.Module:
    """Undo `speed_up`. Raises ValueError if nothing was sped up."""
    if not _exchange(model, FastDora, DoraLinearVariant):
        raise ValueError("the model was not sped up: there is nothing to undo")
    return model


def _exchange(model: nn.Module, old: type, make) -> int:
    count = 0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, variant in module.lora_variant.items():
                if type(variant) is old:
                    module.lora_variant[name] = make()
                    count += 1
    return count
