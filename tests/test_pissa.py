"""PiSSA: what is frozen and what is trained make W0, as PEFT has it, and what was trained goes back onto W0."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_llama import as_if_trained, base_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dora_lab import geometry, guards
from dora_lab.adapters import (
    LLAMA_TARGETS,
    AdapterConfig,
    adapted_modules,
    attach,
    dora_weight,
    initial_weight,
    lora_weight,
    merge,
    unmerge,
)
from dora_lab.checkpoint import load_adapter, save_adapter
from dora_lab.kernels import weight_of
from dora_lab.pissa import onto_the_base, principal_pair

TOKENS = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))  # (batch, positions)
either_method = pytest.mark.parametrize("method", ["lora", "dora"])


def with_pissa(method: str, **settings) -> LlamaForCausalLM:
    return attach(base_model(), AdapterConfig(method, 3, 4, initialisation="pissa", **settings))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


# --- The start ---


def test_the_pair_is_the_best_approximation_shared_evenly():
    weight = torch.randn(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A, B = principal_pair(weight, 4, 0.5)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - 0.5 * B @ A).norm(), values[4:].norm())
    for own in (A @ A.T, B.T @ B):
        torch.testing.assert_close(own, torch.diag(values[:4] / 0.5))


@either_method
@pytest.mark.parametrize("layer", [lambda: nn.Linear(9, 12), lambda: Conv1D(12, 9)], ids=["Linear", "Conv1D"])
def test_frozen_and_trained_make_w0_and_the_output_stays(layer, method):
    torch.manual_seed(0)
    model = nn.Sequential(layer()).double()
    before, x = weight_of(model[0]).clone(), torch.randn(5, 9, dtype=torch.float64)
    output = model(x)
    attach(model, AdapterConfig(method, 3, 4, target_modules=("0",), initialisation="pissa"))
    module = model[0]
    torch.testing.assert_close(model(x), output)
    torch.testing.assert_close(lora_weight(weight_of(module.base), module.lora_A, module.lora_B, 4 / 3).data, before)
    torch.testing.assert_close(initial_weight(module), before)
    rest = torch.linalg.svdvals(weight_of(module.base))  # 9 values, three of which were taken out
    torch.testing.assert_close(rest, torch.cat([torch.linalg.svdvals(before)[3:], torch.zeros(3).double()]))
    if method == "dora":
        torch.testing.assert_close(module.magnitude.data, geometry.magnitude(before))


def test_a_weight_that_is_shared_stays_whole_in_the_other_layer():
    model = nn.ModuleDict({"embedding": nn.Embedding(12, 9), "head": nn.Linear(9, 12, bias=False)})
    model["head"].weight = model["embedding"].weight
    before = model["embedding"].weight.detach().clone()
    attach(model, AdapterConfig("lora", 3, 4, target_modules=("head",), initialisation="pissa"))
    assert torch.equal(model["embedding"].weight, before)
    assert not torch.equal(model["head"].base.weight, before)


def test_modules_with_m_alone_are_left_whole():
    model, before = with_pissa("dora", method_pattern={"(up|down)_proj": "dora-magnitude"}), base_model()
    for name, module in adapted_modules(model).items():
        same = torch.equal(module.base.weight, before.get_submodule(name).weight)
        assert same == name.endswith(("up_proj", "down_proj")), name


def test_update_geometry_is_measured_from_w0():
    model = with_pissa("dora")
    rows = guards.geometry(model, guards.base_weights(model), 0)
    assert len(rows) == 4
    for row in rows:
        assert row["delta_magnitude"] < 1e-5 and row["delta_direction"] < 1e-5
    assert guards.geometry(as_if_trained(model), guards.base_weights(model), 1)[0]["delta_direction"] > 1e-3


# --- Beside PEFT ---


@either_method
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
def test_pefts_pissa_is_the_same(method, rslora):
    ours = with_pissa(method, use_rslora=rslora)
    settings = {"use_dora": method == "dora", "use_rslora": rslora, "init_lora_weights": "pissa"}
    config = LoraConfig(r=3, lora_alpha=4, target_modules=list(LLAMA_TARGETS), **settings)
    theirs = get_peft_model(base_model(), config).eval()
    for name, module in adapted_modules(ours).items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(module.lora_A, A)
        torch.testing.assert_close(module.lora_B, B)
        torch.testing.assert_close(module.base.weight, layer.base_layer.weight)
        if method == "dora":
            torch.testing.assert_close(module.magnitude, layer.lora_magnitude_vector["default"].weight)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def test_pefts_conversion_to_lora_gives_the_same_update(tmp_path):
    """PEFT subtracts a start that was saved beforehand; its A and B are ours up to the order of the two halves."""
    config = LoraConfig(r=3, lora_alpha=4, target_modules=list(LLAMA_TARGETS), init_lora_weights="pissa")
    theirs = get_peft_model(base_model(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    as_if_trained(theirs)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = as_if_trained(with_pissa("lora"))
    save_adapter(ours, tmp_path / "ours")
    loaded = {who: adapted_modules(load_adapter(base_model(), tmp_path / who)) for who in ("theirs", "ours")}
    for name, module in loaded["ours"].items():
        other = loaded["theirs"][name]
        assert module.lora_A.shape == other.lora_A.shape == (6, 16 if "down" not in name else 24)
        torch.testing.assert_close(module.effective_weight(), other.effective_weight(), rtol=1e-4, atol=1e-5)


# --- What was trained, merged and saved ---


@either_method
def test_merging_gives_the_weight_that_the_formula_gives(method):
    model = as_if_trained(with_pissa(method))
    before, output = {name: m.base.weight.clone() for name, m in adapted_modules(model).items()}, logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), output, rtol=1e-4, atol=1e-5)
    for name, module in adapted_modules(model).items():
        W0, pair = base_model().get_submodule(name).weight, onto_the_base(module)
        weight = lora_weight(W0, *pair, 4 / 3) if method == "lora" else dora_weight(W0, module.magnitude, *pair, 4 / 3)
        torch.testing.assert_close(module.base.weight.data, weight.data, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert all(torch.equal(m.base.weight, before[name]) for name, m in adapted_modules(model).items())


SAVED = {
    "lora": ("lora", {}),
    "dora": ("dora", {}),
    "rslora": ("dora", {"use_rslora": True}),
    "patterns": ("dora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    "hybrid": (
        "dora",
        {"method_pattern": {"q_proj": "lora", "up_proj": "dora-magnitude", "0.mlp.down_proj": "frozen"}},
    ),
}


@pytest.mark.parametrize("case", list(SAVED))
def test_what_is_saved_belongs_to_the_untouched_base(case, tmp_path):
    method, settings = SAVED[case]
    model = as_if_trained(with_pissa(method, **settings))
    save_adapter(model, tmp_path)
    ours = load_adapter(base_model(), tmp_path)
    theirs = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    for loaded in (ours, theirs):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert (ours.adapter_config.rank, ours.adapter_config.initialisation) == (6, "kaiming")
    save_adapter(ours, tmp_path / "again")
    assert torch.equal(logits(load_adapter(base_model(), tmp_path / "again")), logits(ours))


def test_a_model_whose_base_was_split_takes_no_other_adapter(tmp_path):
    save_adapter(with_pissa("dora"), tmp_path)
    with pytest.raises(ValueError, match="started by PiSSA, which took them out of its base: load the adapter in"):
        load_adapter(with_pissa("dora"), tmp_path)


# --- Errors ---


@pytest.mark.parametrize(
    ("change", "rank", "message"),
    [
        (
            lambda weight: weight,
            5,
            "rank 5 is too large for PiSSA in module 1: .* saved as rank 10; choose .* at most 4",
        ),
        (lambda weight: weight * torch.nan, 2, "weight of module 1 is not finite"),
        (lambda weight: weight.to(torch.int8), 2, r"module 1 is quantised \(Linear\): PiSSA"),
    ],
    ids=["rank", "nan", "quantised"],
)
def test_what_cannot_be_split_is_refused_and_nothing_is_changed(change, rank, message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 9))
    model[1].weight = nn.Parameter(change(model[1].weight.data), requires_grad=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attach(model, AdapterConfig("dora", rank, 4, target_modules=("0", "1"), initialisation="pissa"))
    after = model.state_dict()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)


def test_pissa_needs_low_rank_matrices():
    with pytest.raises(ValueError, match="initialisation 'pissa' is for lora and dora: method 'full' has no A and B"):
        AdapterConfig("full", initialisation="pissa")
    with pytest.raises(ValueError, match="unknown initialisation 'svd': choose kaiming or pissa"):
        AdapterConfig("dora", 2, 4, initialisation="svd")
