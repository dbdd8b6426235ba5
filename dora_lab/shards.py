"""FSDP: every process keeps a part of each parameter, and a layer is whole only while it is being computed.

The model is sharded here, on GPUs as on the CPU, after its adapters are attached: DoRA's m starts as a norm of whole
rows. `accelerate launch --use_fsdp` asks for it; accelerate's own FSDP knows no CPU and no DoRA.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dora_lab import processes
from dora_lab.adapters import adapted_modules

ASKED = "ACCELERATE_USE_FSDP"  # set by `accelerate launch --use_fsdp`


def asked_for() -> bool:
    """Whether the launcher asks for shards; one process keeps its model whole."""
    return processes.count() > 1 and os.environ.get(ASKED, "").lower() in ("true", "1")


def check(method: str, quantisation: str, optimizer: str, dtype: str) -> None:
    """Raise ValueError, with what to set, for a run that is asked to shard and cannot."""
    if not asked_for():
        return
    for wrong, advice in (
        (method == "full", "full fine-tuning is not offered: choose lora, dora or dora-magnitude"),
        (quantisation != "none", f"a base in {quantisation} cannot be cut: set quantisation to none"),
        (optimizer != "adamw", f"{optimizer} does not know parts: set optimizer to adamw"),
        (dtype == "float16" and torch.cuda.is_available(), "gradients cannot be scaled: set dtype to bfloat16"),
    ):
        if wrong:
            raise ValueError(f"FSDP is asked for ({ASKED}); {advice}, or launch without FSDP")


@contextmanager
def done_here() -> Iterator[None]:
    """Within the block no library sees that shards are asked for, so that none makes its own."""
    asked = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[ASKED] = asked


def shard(model: nn.Module) -> None:
    """Spread each decoder layer, and what is outside of them, over the processes; on GPUs each part goes to its own.

    Peak memory while it is done: the parts, and one whole layer.
    """
    device = processes.device()
    mesh = dist.init_device_mesh(device.type, (processes.count(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # What transformers says of a model that it has sharded itself: its Trainer leaves placement and gradients to it.
    model._is_distributed_loading_by_transformers = True


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this is one process's part, in every process; all of them must ask. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `like` is; all of them must ask. The tensor if `like` is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextmanager
def gathered(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block the decoder layer that holds the module of that name is whole, in every process."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))
    layer = next((module for module in above if isinstance(module, FSDPModule)), None)
    if layer is not None:
        layer.unshard()
    yield
    if layer is not None:
        layer.reshard()


def keep_adapters_whole(model: nn.Module) -> None:
    """Put whole parameters into the adapters of a sharded model, to be saved; it computes nothing from then on."""
    for module in adapted_modules(model).values():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(whole(parameter.detach()), requires_grad=False))
