"""Magnitude and direction of a weight, and how far an update moves each (DoRA, arXiv 2402.09353, Sec. 3.2).

PyTorch keeps a linear layer's weight as (out, in). The paper writes W as (d, k), one column per output feature, and
takes norms "column-wise"; that is `dim=1` here: one magnitude per output feature, one direction per row.
Everything is computed in float32, or in float64 where the weight is float64.
"""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """m = ‖W‖, the norm of each row: (out, in) -> (out,)."""
    return torch.linalg.vector_norm(_wide(weight), dim=1)  # (out,)


def direction(weight: Tensor) -> Tensor:
    """V = W / ‖W‖, each row scaled to norm 1: (out, in) -> (out, in). A row of zeros has none and stays zero."""
    norm = magnitude(weight)  # (out,)
    return _wide(weight) / torch.where(norm == 0, 1.0, norm)[:, None]  # (out, in)


def delta_magnitude(weight: Tensor, base: Tensor) -> float:
    """ΔM (Eq. 3): mean over output features n of |m_n(t) - m_n(0)|. Both weights are (out, in), else ValueError."""
    _same_shape(weight, base)
    return (magnitude(weight) - magnitude(base)).abs().mean().item()


def delta_direction(weight: Tensor, base: Tensor) -> float:
    """ΔD (Eq. 4): mean over output features n of 1 - cos(V_n(t), W0_n). Both weights are (out, in), else ValueError.

    A row of zeros in either weight has no direction and counts as unmoved. Taken in float64 as ‖V_n - V0_n‖² / 2, which
    is the same number and does not cancel when the angle is small.
    """
    _same_shape(weight, base)
    weight, base = weight.double(), base.double()
    moved = (direction(weight) - direction(base)).square().sum(dim=1) / 2  # (out,)
    has_direction = (magnitude(weight) > 0) & (magnitude(base) > 0)  # (out,)
    return torch.where(has_direction, moved, 0.0).mean().item()


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _same_shape(weight: Tensor, base: Tensor) -> None:
    if weight.ndim != 2 or weight.shape != base.shape:
        raise ValueError(
            f"weights of shapes {tuple(weight.shape)} and {tuple(base.shape)} cannot be compared: "
            "give the same layer's weight twice, both (out, in)"
        )
