"""PiSSA (arXiv 2404.02948): A and B start as the largest singular triples of W0, and the rest of W0 is what is frozen.

    W0 = U·Σ·Vᵀ      A = √(Σ_r / s)·V_rᵀ      B = U_r·√(Σ_r / s)      W_res = W0 - s·B·A

so W_res + s·B·A is W0 again, and training moves the directions in which W0 is largest. √ and 1 / s as in PEFT, whose
`init_lora_weights="pissa"` gives the same A, B and W_res. For DoRA the magnitude is that of W0.

The base's weight becomes W_res. What was trained goes back onto an untouched W0 as an ordinary adapter of rank 2·r,

    W_res + s·B·A = W0 + s·(B·A - B0·A0) = W0 + s·[B, -B0]·[A; A0],

for DoRA as well, since m and the norm are those of the same matrix: that is how `checkpoint` saves it.
"""

import torch
from torch import Tensor, nn

from dora_lab.kernels import features_of, replace_weight, weight_of


def principal_pair(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(A (rank, in), B (out, rank)) with s·B·A the best approximation of weight (out, in) of that rank.

    A full singular value decomposition in float32 (float64 of a float64 weight); Σ is shared evenly by A and B.
    """
    left, values, right = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), False)
    share = (values[:rank] / scaling).sqrt()  # (rank,)
    return share[:, None] * right[:rank], left[:, :rank] * share


@torch.no_grad()
def split_weight(base: nn.Module, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Take the `rank` largest singular triples out of `base`, which keeps W_res in its own precision; returns (A, B).

    A weight that is shared with another layer stays whole there.
    """
    weight = weight_of(base)  # (out, in)
    lora_A, lora_B = principal_pair(weight, rank, scaling)
    residual = (weight.to(lora_A.dtype) - scaling * (lora_B @ lora_A)).to(weight.dtype)  # (out, in)
    replace_weight(base, residual)
    return lora_A, lora_B


def check_can_be_split(name: str, base: nn.Module, rank: int) -> None:
    """Raise ValueError, naming the module, for a layer or a rank that PiSSA cannot start from."""
    if not base.weight.is_floating_point():
        raise ValueError(
            f"module {name} is quantised ({type(base).__name__}): PiSSA takes singular triples out of the weight, "
            "and 4 or 8 bits would round the rest anew; load the base in 16 or 32 bits, or take initialisation kaiming"
        )
    largest = min(features_of(base)) // 2
    if rank > largest:
        raise ValueError(
            f"rank {rank} is too large for PiSSA in module {name}: what it learns is saved as rank {2 * rank}; "
            f"choose a rank of at most {largest}"
        )
    weight = weight_of(base)
    if weight.device.type != "meta" and not weight.isfinite().all():
        raise ValueError(f"the weight of module {name} is not finite: it has no singular values; load the base anew")


def onto_the_base(module: nn.Module) -> tuple[Tensor, Tensor]:
    """(A (2·rank, in), B (out, 2·rank)) that do on W0 what the module's A and B do on W_res."""
    return torch.cat([module.lora_A, module.start_A]), torch.cat([module.lora_B, -module.start_B], dim=1)
