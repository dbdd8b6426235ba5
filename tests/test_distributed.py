"""Two processes under DDP and under FSDP2: the gradients of one process that has the whole batch."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dora_lab.adapters import AdapterConfig, adapted_modules, attach
from dora_lab.models import checkpoint_layers

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


without_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")


@without_gloo
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


# --- FSDP2 ---


def make_llama(method: str, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    adapters = AdapterConfig(method) if method == "dora-magnitude" else AdapterConfig(method, 3, 6)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = attach(LlamaForCausalLM(config).to(dtype), adapters, torch.Generator().manual_seed(1))
    for module in adapted_modules(model).values():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B, std=0.2)
    return model.train()


def train_llama(model: nn.Module, share: slice) -> list[float]:
    """Losses of some steps of two micro-batches each; `share` is the part of every micro-batch that is read."""
    tokens = torch.randint(0, 50, (2, 4, 12), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(STEPS):
        for micro in range(2):
            loss = model(input_ids=tokens[micro, share], labels=tokens[micro, share]).loss
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sharded(rank: int, folder: str, method: str, dtype: torch.dtype, checkpointing: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = make_llama(method, dtype)
    if checkpointing:
        checkpoint_layers(model)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train_llama(model, slice(2 * rank, 2 * rank + 2))
    computed = {module.cache.computed for module in adapted_modules(model).values() if hasattr(module, "cache")}
    found = {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save((found, losses, computed), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@without_gloo
@pytest.mark.parametrize(
    ("method", "dtype", "checkpointing"),
    [
        ("lora", torch.float32, False),
        ("dora", torch.float32, False),
        ("dora", torch.float32, True),
        ("dora-magnitude", torch.float32, False),
        ("dora", torch.bfloat16, False),
    ],
)
def test_sharded_weights_train_as_whole_ones(tmp_path, method, dtype, checkpointing):
    """DoRA's norm is of whole rows, though each process keeps half of them; once a step, as without shards."""
    alone = make_llama(method, dtype)
    expected = train_llama(alone, slice(0, 4))
    mp.spawn(sharded, (str(tmp_path), method, dtype, checkpointing), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    mean = [(one + other) / 2 for one, other in zip(parts[0][1], parts[1][1], strict=True)]
    assert mean == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.02)
    for name, value in parts[0][0].items():
        torch.testing.assert_close(value, alone.get_parameter(name).detach(), **tolerance)
    if method == "dora":
        assert parts[0][2] == {STEPS}
