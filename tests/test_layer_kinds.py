"""Adapters around what is no plain nn.Linear: GPT-2's Conv1D, 8-bit and 4-bit layers; patterns and magnitude-only."""

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dora_lab.adapters import AdapterConfig, DoRALinear, MagnitudeLinear, adapted_modules, attach, merge, unmerge
from dora_lab.checkpoint import load_adapter, save_adapter
from dora_lab.geometry import magnitude
from dora_lab.kernels import weight_of


def make_base(kind: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(64, 96, bias=bias)
    if kind == "Conv1D":
        layer = Conv1D(96, 64)
        layer.load_state_dict({"weight": plain.weight.T, "bias": plain.bias})
    elif kind == "4 bits":
        layer = bnb.nn.Linear4bit(64, 96, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
        layer.load_state_dict(plain.state_dict())
    else:
        layer = bnb.nn.Linear8bitLt(64, 96, bias=bias, has_fp16_weights=False)
        layer.load_state_dict(plain.state_dict())
    return nn.Sequential(layer.to("cpu")).requires_grad_(False)


KINDS = [("Conv1D", True), ("4 bits", True), ("4 bits", False), ("8 bits", True), ("8 bits", False)]


@pytest.mark.parametrize("method", ["lora", "dora", "dora-magnitude"])
@pytest.mark.parametrize(("kind", "bias"), KINDS)
def test_step_0_is_the_base_and_the_rest_the_effective_weight(kind, bias, method):
    model = make_base(kind, bias)
    x = torch.randn(4, 3, 64, requires_grad=True)
    expected = model(x).detach()
    rank = () if method == "dora-magnitude" else (4, 8)
    attach(model, AdapterConfig(method, *rank, target_modules=("0",)))
    layer = model[0]
    assert torch.equal(model(x), expected)
    for name, parameter in layer.named_parameters():
        if name in ("lora_B", "magnitude"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    if hasattr(layer, "cache"):
        layer.cache.forget()
    y, weight = model(x), layer.effective_weight()
    plain = F.linear(x, weight, layer.base.bias)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    gradient = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, [x, *parameters], gradient),
        torch.autograd.grad(plain, [x, *parameters], gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_merging_into_a_quantised_layer_is_refused(kind):
    model = attach(make_base(kind), AdapterConfig("dora", 4, 8, target_modules=("0",)))
    with pytest.raises(ValueError, match="module 0 is quantised.*load the base in 16 or 32 bits"):
        merge(model)
    assert not model[0].merged


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=2)).eval()


def test_gpt2_merges_and_goes_to_peft_and_back(tmp_path):
    from peft import PeftModel

    tokens = torch.arange(12).view(2, 6)
    model = attach(gpt2(), AdapterConfig("dora", 3, 6, target_modules=("c_attn", "c_fc")))
    for module in adapted_modules(model).values():
        assert type(module.base) is Conv1D and module.magnitude.shape == (module.base.nf,)
        nn.init.normal_(module.lora_B, std=0.2)
    before = model(tokens).logits
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).logits, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(load_adapter(gpt2(), tmp_path)(tokens).logits, before)
    weights = {name: module.base.weight.clone() for name, module in adapted_modules(model).items()}
    torch.testing.assert_close(merge(model)(tokens).logits, before, rtol=1e-4, atol=1e-5)
    for module in adapted_modules(model).values():
        torch.testing.assert_close(magnitude(weight_of(module.base)), module.magnitude.data)
    unmerge(model)
    assert all(torch.equal(module.base.weight, weights[name]) for name, module in adapted_modules(model).items())


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 8))


def test_ranks_alphas_and_methods_by_module():
    patterns = {"rank_pattern": {"1": 2}, "alpha_pattern": {"1": 6}, "method_pattern": {"2": "dora-magnitude"}}
    model = attach(stack(), AdapterConfig("dora", 4, 8, target_modules=("0", "1", "2"), **patterns))
    first, second, third = adapted_modules(model).values()
    assert isinstance(first, DoRALinear) and isinstance(second, DoRALinear) and isinstance(third, MagnitudeLinear)
    assert [m.lora_A.shape[0] for m in (first, second)] == [4, 2] and (first.scaling, second.scaling) == (2, 3)
    rs = attach(stack(), AdapterConfig("lora", 4, 8, target_modules=("0",), use_rslora=True))
    assert rs[0].scaling == 8 / 4**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"1": 11}}, "rank 11 is too large for module 1"),
        ({"rank_pattern": {"1": 0}}, "the rank of '1' must be a whole number above 0"),
        ({"method_pattern": {"7": "lora"}}, "method_pattern names '7'"),
        ({"dropout_on": "all"}, "unknown dropout_on 'all'"),
        ({"kernel": "quick"}, "unknown kernel 'quick'"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        attach(stack(), AdapterConfig("dora", 4, 8, target_modules=("0", "1", "2"), **settings))


def test_attaching_twice_names_what_is_adapted():
    model = nn.Sequential(stack())
    attach(model[0], AdapterConfig("dora", 2, 4, target_modules=("1",)))
    with pytest.raises(ValueError, match="target module 0.1 is adapted already"):
        attach(model, AdapterConfig("dora", 2, 4, target_modules=("1",)))
