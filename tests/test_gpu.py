"""On a CUDA device: the fast path against the reference, quantised bases, PEFT sped up, and peak memory."""

import copy

import pytest
import torch
from torch import nn

from dora_lab.adapters import AdapterConfig, adapted_modules, attach
from dora_lab.bench import Setting, build, make_step, peak_bytes
from dora_lab.speedup import speed_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def results(model, x):
    y = model(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [8, 384])
def test_the_fast_path_equals_the_reference(dtype, rank):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    base = nn.Sequential(nn.Linear(512, 768), nn.SiLU(), nn.Linear(768, 512)).to("cuda", dtype)
    x, found = torch.randn(4, 64, 512, device="cuda", dtype=dtype), []
    for kernel in ("fast", "reference"):
        config = AdapterConfig("dora", rank, 2 * rank, target_modules=("0", "2"), kernel=kernel)
        model = attach(copy.deepcopy(base), config, torch.Generator().manual_seed(1))
        for index, module in enumerate(adapted_modules(model).values()):
            generator = torch.Generator().manual_seed(index)
            module.lora_B.data = (0.02 * torch.randn(module.lora_B.shape, generator=generator)).cuda()
        found.append(results(model, x))
    for fast, plain in zip(*found, strict=True):
        fast, plain, tolerance = fast.float(), plain.float(), 1e-5 if dtype == torch.float32 else 0.02
        assert (fast - plain).norm() <= tolerance * plain.norm()


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_peft_sped_up_gives_pefts_logits(precision):
    setting = Setting(2, 32, hidden=256, layers=2, rank=8, precision=precision)
    model = build("dora-peft", setting, "cuda").eval()
    tokens = torch.arange(64, device="cuda").view(2, 32)
    with torch.no_grad():
        before = model(input_ids=tokens).logits.float()
        after = speed_up(model)(input_ids=tokens).logits.float()
    assert (after - before).norm() <= 0.02 * before.norm()


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_checkpointed_dora_peaks_where_lora_does(precision):
    setting = Setting(8, 512, checkpointing=True, hidden=1024, layers=4, rank=16, precision=precision)
    peaks = {}
    for variant in ("lora", "dora"):
        model = build(variant, setting, "cuda")
        step = make_step(model, setting)
        step()
        peaks[variant] = peak_bytes(step)
    assert peaks["dora"] <= 1.02 * peaks["lora"]
