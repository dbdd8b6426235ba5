"""Two processes under DistributedDataParallel: the gradients of one process that has the whole batch."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dora_lab.adapters import AdapterConfig, adapted_modules, attach

STEPS = 3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6, bias=False))
    attach(model, AdapterConfig("dora", 3, 6, target_modules=("0", "2")))
    for module in adapted_modules(model).values():
        nn.init.normal_(module.lora_B, std=0.2)
    return model


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, share: slice) -> dict[str, torch.Tensor]:
    """Parameters after some steps of two micro-batches each; `share` is the part of every micro-batch that is read."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(STEPS):
        for micro in range(2):
            (nn.functional.mse_loss(model(x[micro, share]), y[micro, share]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): p.detach() for name, p in trained.items()}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, 12, generator=generator), torch.randn(2, 8, 6, generator=generator)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(make_model())
    found = train(model, *data(), slice(4 * rank, 4 * rank + 4))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path):
    alone = make_model()
    before = copy.deepcopy(alone)
    expected = train(alone, *data(), slice(0, 8))
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in expected.items():
        assert not torch.equal(value, before.get_parameter(name))
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)
