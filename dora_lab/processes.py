"""The processes that share one run, as `accelerate launch` starts them; a run of its own is the case of one.

The first of them writes. Rank and number come from the environment that the launcher sets.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

WAIT = timedelta(hours=6)  # for one process that evaluates or fetches


def count() -> int:
    """How many share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this one writes."""
    return rank() == 0


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else _cpu()


@contextmanager
def launched() -> Iterator[None]:
    """Let the processes of a launcher find each other for the time of the block; nothing for a process of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    yield  # one that fails takes no leave: others may be waiting for it, and its launcher ends them when it is gone
    dist.destroy_process_group()


@contextmanager
def first(prepare: Callable[[], None], hold: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Within the block the first process holds `hold()`, after `prepare()`; the others begin when it does."""
    if is_first():
        prepare()
        with hold():
            _wait()
            yield
    else:
        _wait()
        yield


@contextmanager
def one_after_another() -> Iterator[None]:
    """The first process runs the block before the others do."""
    if not is_first():
        _wait()
    yield
    if is_first():
        _wait()


def told_by_first(find: Callable[[], Any]) -> Any:
    """What `find()` is for the first process, for all."""
    if count() == 1:
        return find()
    told = [find() if is_first() else None]
    dist.broadcast_object_list(told, src=0, device=_cpu())
    return told[0]


def gathered(own: list) -> list[list]:
    """The lists of all processes, by rank."""
    if count() == 1:
        return [own]
    found: list = [None] * count()
    dist.all_gather_object(found, own)
    return found


def _wait() -> None:
    if count() > 1:
        dist.barrier()


def _cpu() -> torch.device:
    return torch.device("cpu")
