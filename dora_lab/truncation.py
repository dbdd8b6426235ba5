"""Where the rank of a trained update went: one threshold on the singular values of all modules, applied afterwards.

ΔW = W' - W0 is taken apart, every module's singular values below the one threshold are dropped, and the model is asked
again. How many a module keeps is the rank that its update needed. DoRA's ΔW has full rank even where B·A has rank 1:
the magnitude rescales W0's rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_lab.adapters import adapted_modules
from dora_lab.checkpoint import load_adapter
from dora_lab.kernels import replace_weight, weight_of
from dora_lab.models import load_model
from dora_lab.probes import target_linears
from dora_lab.records import run_folder
from dora_lab.specs import RunSpec

Update = Mapping[str, tuple[Tensor, Tensor, Tensor]]  # module -> U (out, n), singular values (n,), Vᵀ (n, in)


def decompose(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Update:
    """The SVD of after - before of every module. Raises ValueError if the two are not of the same modules."""
    if before.keys() != after.keys():
        raise ValueError(f"the two do not have the same modules: {sorted(before.keys() ^ after.keys())[:3]} differ")
    return {name: torch.linalg.svd((after[name] - before[name]).double(), full_matrices=False) for name in before}


@torch.no_grad()
def run_update(spec: RunSpec, runs_dir: Path) -> Update:
    """The update that a finished run made to its target modules, from the adapter or the model in its folder.

    Raises FileNotFoundError if the folder no longer holds it.
    """
    model, folder = load_model(spec.base_model, spec.dtype, revision=spec.revision), run_folder(runs_dir, spec)
    saved = folder / ("model" if spec.method == "full" else "adapter")
    if not saved.is_dir():
        raise FileNotFoundError(f"{saved} does not exist: delete {folder} and run again, recorded runs keep none")
    before = {name: weight_of(linear).clone() for name, linear in target_linears(model, spec.target_modules).items()}
    if spec.method == "full":
        trained = target_linears(load_model(str(saved), spec.dtype), spec.target_modules)
        return decompose(before, {name: weight_of(linear) for name, linear in trained.items()})
    load_adapter(model, saved)
    moved = {name: module.effective_weight() for name, module in adapted_modules(model).items()}
    return decompose(before, before | moved)  # a target that is frozen has no adapter, and no update


def threshold_of(update: Update, total: int) -> float:
    """The threshold that keeps the `total` largest singular values of all modules together, or all there are."""
    values = torch.cat([values for _, values, _ in update.values()]).sort(descending=True).values
    return float("inf") if total < 1 else values[min(total, len(values)) - 1].item()


def kept_ranks(update: Update, threshold: float) -> dict[str, int]:
    """How many singular values of each module reach the threshold."""
    return {name: int((values >= threshold).sum()) for name, (_, values, _) in update.items()}


@contextmanager
@torch.no_grad()
def truncated(model: nn.Module, update: Update, threshold: float, target_modules: Sequence[str]) -> Iterator[None]:
    """The base `model` with what reaches the threshold of `update` added to its weights, for as long as it lasts.

    Raises ValueError for a quantised base, whose weights would be rounded anew.
    """
    linears = target_linears(model, target_modules)
    for name, linear in linears.items():
        if not linear.weight.is_floating_point():
            raise ValueError(f"module {name} is quantised: load the base in 16 or 32 bits to add an update to it")
    before = {name: linear.weight for name, linear in linears.items()}
    try:
        for name, linear in linears.items():
            U, values, Vt = update[name]
            rank = int((values >= threshold).sum())
            kept = (U[:, :rank] * values[:rank]) @ Vt[:rank]  # (out, in)
            replace_weight(linear, weight_of(linear) + kept.to(linear.weight.dtype))
        yield
    finally:
        for name, linear in linears.items():
            linear.weight = before[name]
