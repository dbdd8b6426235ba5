"""The rank explorer: how much of a matrix a product of two thin ones can hold, and what it costs."""

from dataclasses import dataclass

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dora_lab.widgets.panel import Drawing, Panel, canvas, log_axis, slider

BOUND, RANDOM, CHOSEN = "#0072B2", "#E69F00", "#D55E00"
SIZE = 1024


@dataclass(frozen=True)
class RankErrors:
    """What is needed of a matrix (out, in) to say for every rank how well it can be approximated.

    singular_values: (min(out, in),), falling. bound, random_rows: (min(out, in) + 1,), the relative error
    ‖ΔW - BA‖ / ‖ΔW‖ at ranks 0, 1, …: of the best B and A (Eckart–Young), and of the best B for an A drawn at random.
    """

    shape: tuple[int, int]
    singular_values: Tensor
    bound: Tensor
    random_rows: Tensor

    def parameters(self, rank: int) -> int:
        """Numbers in B (out, rank) and A (rank, in)."""
        return rank * sum(self.shape)


def example_update(size: int = SIZE, seed: int = 0) -> Tensor:
    """A (size, size) update whose singular values fall off as 1 / i, in directions drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return (left / torch.arange(1, size + 1)) @ right.T  # (size, size)


def rank_errors(update: Tensor, seed: int = 0) -> RankErrors:
    """Both errors at every rank, from one singular value decomposition and one QR. Raises ValueError for a zero matrix.

    If the rows of A span the same space as the orthonormal rows q_1 … q_r, the best B leaves ‖ΔW‖² - Σ ‖ΔW·q_i‖².
    """
    if update.ndim != 2 or not update.any():
        raise ValueError(f"rank_errors needs a matrix that is not all zero, got shape {tuple(update.shape)}")
    generator = torch.Generator().manual_seed(seed)
    update = update.detach().double()
    singular_values = torch.linalg.svdvals(update)  # (min(out, in),)
    draws = torch.randn(update.shape[1], len(singular_values), dtype=torch.float64, generator=generator)
    caught = (update @ torch.linalg.qr(draws)[0]).square().sum(dim=0)  # (min(out, in),): ‖ΔW·q_i‖²
    total = update.square().sum()
    errors = [
        ((total - torch.cat([total.new_zeros(1), part.cumsum(0)])).clamp(min=0) / total).sqrt()
        for part in (singular_values.square(), caught)
    ]  # rounding leaves about 1e-8 at the full rank
    return RankErrors(tuple(update.shape), singular_values, *errors)


def rank_figure(errors: RankErrors, rank: int) -> Figure:
    """Left the spectrum with what the rank keeps, right the relative error against the rank."""
    count = len(errors.singular_values)
    figure, (left, right) = canvas(8.4, 3.1, 2)
    index = torch.arange(1, count + 1)
    log_axis(left.xaxis, 1, count)
    log_axis(left.yaxis, errors.singular_values[-1].item(), errors.singular_values[0].item())
    left.plot(index, errors.singular_values, color="0.6", lw=1.5, label="left out")
    if rank:
        left.plot(index[:rank], errors.singular_values[:rank], color=BOUND, lw=4, label="kept")
    left.axvline(max(rank, 0.8), color=CHOSEN, ls="--", lw=1)
    left.set(xlabel="index i", ylabel="singular value σᵢ of ΔW")
    left.set_title(f"spectrum, rank {rank}", fontsize=10)
    left.legend(frameon=False)
    ranks = torch.arange(count + 1)
    right.plot(ranks, errors.random_rows, color=RANDOM, ls="--", label="A random, best B")
    right.plot(ranks, errors.bound, color=BOUND, label="best A and B (Eckart–Young)")
    right.plot(rank, errors.bound[rank], "o", color=CHOSEN, ms=7)
    right.plot(rank, errors.random_rows[rank], "s", color=CHOSEN, ms=6)
    right.axvline(rank, color=CHOSEN, ls="--", lw=1)
    right.set(xlabel="rank r", ylabel="relative error", ylim=(0, 1.03))
    right.set_title(_cost(errors, rank), fontsize=10)
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(0.1, 0.32))
    figure.subplots_adjust(left=0.08, right=0.98, top=0.9, bottom=0.16, wspace=0.25)
    return figure


def rank_alt(errors: RankErrors, rank: int) -> str:
    """Alt text of `rank_figure`: parameters, saving, and both errors at this rank."""
    rows, columns = errors.shape
    whole = rows * columns
    return (
        f"A {rows} × {columns} update at rank {rank}: {errors.parameters(rank):,} parameters of {whole:,}, "
        f"{_saving(errors, rank)}. Relative error {errors.bound[rank]:.3f} at best (Eckart–Young), "
        f"{errors.random_rows[rank]:.3f} with A drawn at random and the best B. Singular values fall from "
        f"{errors.singular_values[0]:.3g} to {errors.singular_values[-1]:.3g}; the first {rank} are kept."
    )


def rank_explorer(update: Tensor | None = None, rank: int = 10, largest: int = 256) -> Panel:
    """Panel: a slider for the rank → parameters, error, spectrum of `update`, a 1024 × 1024 example if not given."""
    errors = rank_errors(example_update() if update is None else update)
    largest = min(largest, len(errors.singular_values))
    tooltip = "Number of columns of B and rows of A; arrow keys change it by one"
    control = slider(ipywidgets.IntSlider, "rank r", tooltip, value=min(rank, largest), min=0, max=largest)
    return Panel({"rank": control}, lambda rank: Drawing(rank_figure(errors, rank), rank_alt(errors, rank)))


def _saving(errors: RankErrors, rank: int) -> str:
    share = errors.parameters(rank) / (errors.shape[0] * errors.shape[1])
    return f"a saving of {100 * (1 - share):.2f} %" if share <= 1 else f"{share:.2f} times as many as the matrix itself"


def _cost(errors: RankErrors, rank: int) -> str:
    return f"{errors.parameters(rank):,} parameters, {_saving(errors, rank)}"
