"""Magnitude and direction of a weight, and how far an update moves each (DoRA paper, Sec. 3.2).

PyTorch keeps a linear layer's weight as (out, in). The paper writes W as (d, k), one column per output feature, and
takes norms "column-wise"; that is `dim=1` here: one magnitude per output feature, one direction per row.
"""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Norm of each row, float32: (out, in) -> (out,)."""
    return torch.linalg.vector_norm(weight.float(), dim=1)  # (out,)


def direction(weight: Tensor) -> Tensor:
    """Rows scaled to norm 1, float32: (out, in) -> (out, in). A row of zeros has no direction and stays zero."""
    norm = magnitude(weight)
    return weight.float() / torch.where(norm == 0, 1.0, norm)[:, None]  # (out, in)


def delta_magnitude(weight: Tensor, base: Tensor) -> float:
    """ΔM: mean over output features of |m_n(t) - m_n(0)|; both weights are (out, in)."""
    _same_shape(weight, base)
    return (magnitude(weight) - magnitude(base)).abs().mean().item()


def delta_direction(weight: Tensor, base: Tensor) -> float:
    """ΔD: mean over output features of 1 - cos(V_n(t), W0_n); both weights are (out, in). Zero rows count as unmoved.

    Taken as half the squared distance of the directions, which is the same and keeps small angles exact.
    """
    _same_shape(weight, base)
    moved = (direction(weight.double()) - direction(base.double())).double().square().sum(dim=1) / 2  # (out,)
    here = (magnitude(weight) > 0) & (magnitude(base) > 0)
    return torch.where(here, moved, 0.0).mean().item()


def _same_shape(weight: Tensor, base: Tensor) -> None:
    if weight.shape != base.shape or weight.ndim != 2:
        raise ValueError(f"two weights of one shape (out, in) expected, got {tuple(weight.shape)}, {tuple(base.shape)}")
