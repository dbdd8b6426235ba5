"""LoRA and DoRA: the identities they must keep, the paper's gradients, and PEFT as the reference."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_lab.adapters import (
    LLAMA_TARGETS,
    AdapterConfig,
    DoRALinear,
    LoRALinear,
    MagnitudeLinear,
    adapted_modules,
    attach,
    dora_norm,
    dora_weight,
    find_targets,
    lora_weight,
    merge,
    trainable_parameters,
    unmerge,
)
from dora_lab.geometry import magnitude

RANK, ALPHA = 4, 6
TOKENS = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))  # (batch, positions)
CONFIGS = {
    "lora": AdapterConfig("lora", RANK, ALPHA),
    "dora": AdapterConfig("dora", RANK, ALPHA),
    "dora-magnitude": AdapterConfig("dora-magnitude"),
}
LAYERS = {"lora": LoRALinear, "dora": DoRALinear, "dora-magnitude": MagnitudeLinear}
every_adapter = pytest.mark.parametrize("method", list(CONFIGS))


def tiny_llama(dtype: torch.dtype = torch.float32, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=bias, mlp_bias=bias, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.to(dtype)


def move_away_from_start(model: nn.Module) -> None:
    """B and m as after some training: B = 0 and m = ‖W0‖ would hide most mistakes."""
    generator = torch.Generator().manual_seed(1)
    for module in adapted_modules(model).values():
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B, std=0.2, generator=generator)
        if hasattr(module, "magnitude"):
            module.magnitude.data *= 0.5 + torch.rand(module.magnitude.shape, generator=generator)


def one_layer(method: str, bias: bool = True, dtype: torch.dtype = torch.float64, dropout: float = 0.0, **settings):
    """(adapter around a 5 -> 7 linear layer with trained-looking values, x of shape (2, 3, 5))"""
    torch.manual_seed(0)
    config = AdapterConfig(method, *((None, None) if method == "dora-magnitude" else (3, 6)), dropout, **settings)
    layer = LAYERS[method](nn.Linear(5, 7, bias=bias, dtype=dtype).requires_grad_(False), config)
    move_away_from_start(nn.ModuleList([layer]))
    return layer, torch.randn(2, 3, 5, dtype=dtype)


# --- The start ---


@every_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_at_step_0_the_output_is_the_base_models_bit_for_bit(method, dtype, bias, dropout):
    model = tiny_llama(dtype, bias).train()
    expected = model(TOKENS).logits
    config = CONFIGS[method]
    attach(model, AdapterConfig(method, config.rank, config.alpha, dropout))
    assert torch.equal(model(TOKENS).logits, expected)


def test_a_generators_seed_fixes_the_start_and_leaves_the_global_one_alone():
    models = [tiny_llama() for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (3, 3, 4), strict=True):
        attach(model, CONFIGS["dora"], torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(*(adapted_modules(model).values() for model in models), strict=True):
        assert torch.equal(a.lora_A, b.lora_A) and not torch.equal(a.lora_A, c.lora_A)
        assert not a.lora_B.any()
        bound = 1 / math.sqrt(a.base.in_features)  # Kaiming-uniform with a = √5
        assert 0.8 * bound < a.lora_A.abs().max() <= bound


@every_adapter
def test_only_the_adapters_are_trained_and_in_float32(method):
    model = attach(tiny_llama(torch.bfloat16), CONFIGS[method])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} <= {"lora_A", "lora_B", "magnitude"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {name.rpartition(".")[2] for name in adapted_modules(model)} == set(LLAMA_TARGETS)
    assert len(adapted_modules(model)) == 2 * len(LLAMA_TARGETS)
    assert trainable_parameters(model)[0] == sum(p.numel() for p in trained.values())


def test_full_trains_everything_and_wraps_nothing():
    model = attach(tiny_llama().requires_grad_(False), AdapterConfig("full"))
    trainable, total = trainable_parameters(model)
    assert trainable == total > 0
    assert adapted_modules(model) == {}


@every_adapter
def test_a_model_in_evaluation_stays_in_evaluation(method):
    model = attach(tiny_llama().eval(), CONFIGS[method])
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("method", "percent", "extra"), [("lora", 0.83, 0), ("dora", 0.84, 32 * (4 * 4096 + 11008))])
def test_parameter_counts_of_llama_7b_are_the_papers(method, percent, extra):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=11008))
    trainable, total = trainable_parameters(attach(model, AdapterConfig(method, 32, 64)))
    assert (trainable, total - trainable) == (56_098_816 + extra, 6_738_415_616)
    assert round(100 * trainable / total, 2) == percent


# --- Eq. 5 ---


@every_adapter
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_a_linear_layer_with_the_effective_weight(method, bias):
    layer, x = one_layer(method, bias)
    expected = F.linear(x, layer.effective_weight(), layer.base.bias)  # (2, 3, 7)
    torch.testing.assert_close(layer(x), expected)
    gradient = torch.randn_like(expected)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), parameters, gradient), torch.autograd.grad(expected, parameters, gradient)
    )


@pytest.mark.parametrize("method", ["dora", "dora-magnitude"])
def test_row_norms_of_the_effective_weight_are_m(method):
    layer, _ = one_layer(method)
    assert layer.magnitude.shape == (7,)  # one for each output feature, as in PEFT, not one for each of the 5 inputs
    torch.testing.assert_close(magnitude(layer.effective_weight()), layer.magnitude.data)


def test_dora_magnitude_is_dora_whose_b_stays_zero():
    only_m, x = one_layer("dora-magnitude")
    dora = DoRALinear(only_m.base, AdapterConfig("dora", 2, 4))
    dora.magnitude.data.copy_(only_m.magnitude)
    torch.testing.assert_close(only_m(x), dora(x))
    torch.testing.assert_close(only_m.effective_weight(), dora.effective_weight())


@pytest.mark.parametrize("method", ["dora", "dora-magnitude"])
def test_faithful_dropout_is_on_what_the_adapter_reads_and_not_on_what_w0_reads(method):
    layer, x = one_layer(method, dropout=0.5, dropout_on="faithful")
    torch.manual_seed(9)
    output = layer(x)
    torch.manual_seed(9)
    change = layer.effective_weight() - layer.base.weight
    torch.testing.assert_close(output, layer.base(x) + F.linear(F.dropout(x, 0.5), change))
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, layer.effective_weight(), layer.base.bias))


def test_dropout_by_default_is_on_the_low_rank_path_alone():
    layer, x = one_layer("dora", dropout=0.5)
    torch.manual_seed(9)
    output = layer(x)
    torch.manual_seed(9)
    gain = layer.magnitude / dora_norm(lora_weight(layer.base.weight, layer.lora_A, layer.lora_B, layer.scaling))
    low_rank = layer.scaling * F.dropout(x, 0.5) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(output, gain * (x @ layer.base.weight.T + low_rank) + layer.base.bias)
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, layer.effective_weight(), layer.base.bias))
    only_m, x = one_layer("dora-magnitude", dropout=0.5)
    torch.testing.assert_close(only_m(x), F.linear(x, only_m.effective_weight(), only_m.base.bias))


# --- Eq. 6, 7 and 11 ---


@pytest.fixture
def decomposed():
    """W0 (6, 4), m (6,), A (2, 4), B (6, 2), s and a gradient ∇W' (6, 4), in float64."""
    torch.manual_seed(0)
    shapes = {"base_weight": (6, 4), "magnitude": (6,), "lora_A": (2, 4), "lora_B": (6, 2)}
    values = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    return values, 1.5, torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize("detach_norm", [True, False], ids=["Eq. 11", "Eq. 6"])
def test_the_gradients_are_the_papers(decomposed, detach_norm):
    values, scaling, gradient = decomposed
    dora_weight(**values, scaling=scaling, detach_norm=detach_norm).backward(gradient)
    W0, m, A, B = (values[name].detach() for name in ("base_weight", "magnitude", "lora_A", "lora_B"))

    V = W0 + scaling * B @ A  # V', (out, in)
    norm = V.norm(dim=1, keepdim=True)  # (out, 1)
    through = gradient if detach_norm else gradient - V * (V * gradient).sum(dim=1, keepdim=True) / norm**2
    gradient_V = m[:, None] / norm * through  # Eq. 11, or Eq. 6: what is left is orthogonal to V'
    gradient_m = (gradient * V).sum(dim=1) / norm[:, 0]  # Eq. 7

    torch.testing.assert_close(values["base_weight"].grad, gradient_V)  # V' = W0 + ..., so ∇W0 = ∇V'
    torch.testing.assert_close(values["magnitude"].grad, gradient_m)
    torch.testing.assert_close(values["lora_B"].grad, scaling * gradient_V @ A.T)
    torch.testing.assert_close(values["lora_A"].grad, scaling * B.T @ gradient_V)


def test_with_the_norm_differentiated_autograd_agrees_with_finite_differences(decomposed):
    values, scaling, _ = decomposed
    assert torch.autograd.gradcheck(lambda *v: dora_weight(*v, scaling, detach_norm=False), tuple(values.values()))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):  # Eq. 11 leaves a part of the true gradient out
        torch.autograd.gradcheck(lambda *v: dora_weight(*v, scaling), tuple(values.values()))


def test_the_layer_does_not_differentiate_the_norm():
    layer, x = one_layer("dora")
    gradient = torch.randn(2, 3, 7, dtype=torch.float64)
    layer(x).backward(gradient)
    gradient_W = torch.einsum("bto,bti->oi", gradient, x)  # (out, in)
    adapted = lora_weight(layer.base.weight, layer.lora_A, layer.lora_B, layer.scaling).detach()
    gradient_V = (layer.magnitude / adapted.norm(dim=1))[:, None] * gradient_W  # Eq. 11
    torch.testing.assert_close(layer.lora_B.grad, (layer.scaling * gradient_V @ layer.lora_A.T).detach())


# --- Zero rows ---


@pytest.mark.parametrize("method", ["dora", "dora-magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_row_gives_the_bias_and_finite_gradients(method, dtype):
    base = nn.Linear(5, 7, dtype=dtype).requires_grad_(False)
    base.weight[2] = 0  # real checkpoints have such rows
    config = AdapterConfig(method, *((None, None) if method == "dora-magnitude" else (2, 4)))
    layer = LAYERS[method](base, config)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        output = layer(torch.randn(4, 5, dtype=dtype))
        assert torch.equal(output[:, 2], base.bias[2].expand(4))
        output.float().square().sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(layer.effective_weight()).all()
    assert not layer.effective_weight()[2].any()


def test_the_norm_of_a_zero_row_is_one_with_a_finite_gradient():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    assert dora_norm(weight).tolist() == [5, 1]
    dora_norm(weight, detach=False).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_autocast_does_not_lower_the_norms_precision():
    layer, _ = one_layer("dora", dtype=torch.float32)
    expected = layer.effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.effective_weight(), expected)


# --- PEFT as the reference ---


def as_peft(model: nn.Module, method: str, dropout: float) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """PEFT's adapters around a copy of the base, and the same parameters by our names: (model, name -> parameter)"""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=method == "dora", target_modules=list(LLAMA_TARGETS)
    )
    theirs = get_peft_model(copy.deepcopy(model), config)
    names = {".lora_A.default.weight": ".lora_A", ".lora_B.default.weight": ".lora_B"}
    names[".lora_magnitude_vector.default.weight"] = ".magnitude"
    found = {}
    for name, parameter in theirs.named_parameters():
        for old, new in names.items():
            if name.endswith(old):
                found[name.removeprefix("base_model.model.").removesuffix(old) + new] = parameter
    return theirs, found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_outputs_and_gradients_equal_pefts(method, dtype, bias, dropout):
    base = tiny_llama(dtype, bias)
    theirs, their_parameters = as_peft(base, method, dropout)
    ours = attach(base, AdapterConfig(method, RANK, ALPHA, dropout, dropout_on="faithful"))
    our_parameters = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert our_parameters.keys() == their_parameters.keys()
    for name, parameter in our_parameters.items():  # both start at the same place but for A, which is drawn
        if not name.endswith(
            "lora_A"
        ):  # PEFT rounds the first m to the base's dtype; then step 0 is not quite the base
            torch.testing.assert_close(parameter.to(dtype).float(), their_parameters[name].data, rtol=0, atol=0)
    move_away_from_start(ours)
    with torch.no_grad():
        for name, parameter in our_parameters.items():
            their_parameters[name].copy_(parameter)

    found = []
    for model, parameters in ((ours.train(), our_parameters), (theirs.train(), their_parameters)):
        torch.manual_seed(7)  # the same dropout masks
        output = model(TOKENS, labels=TOKENS)
        output.loss.backward()
        found.append([output.logits, *(parameters[name].grad for name in our_parameters)])
    assert all(gradient.abs().max() > 0 for gradient in found[0][1:])
    if dtype == torch.float32:
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        return
    # bf16 rounds differently wherever sums are taken in another order: be as near to the exact values as PEFT is
    exact = copy.deepcopy(ours).double()
    exact.zero_grad()
    torch.manual_seed(7)
    output = exact(TOKENS, labels=TOKENS)
    output.loss.backward()
    gradients = {name: p.grad for name, p in exact.named_parameters()}
    truth = [output.logits, *(gradients[name] for name in our_parameters)]
    if dropout == 0:  # the masks of another precision are others
        our_error, their_error = (
            sum((a.double() - b).norm() / b.norm() for a, b in zip(side, truth, strict=True)) for side in found
        )
        assert our_error <= 1.1 * their_error
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 0.1 * b.norm()


# --- Merging ---


@every_adapter
@pytest.mark.parametrize("bias", [False, True])
def test_merged_equals_unmerged_and_unmerge_restores_exactly(method, bias):
    model = attach(tiny_llama(bias=bias).eval(), CONFIGS[method])
    move_away_from_start(model)
    before, weights = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    effective = {name: module.effective_weight() for name, module in adapted_modules(model).items()}

    assert merge(model) is model
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    for name, module in adapted_modules(model).items():
        assert torch.equal(module.base.weight, effective[name])
        assert torch.equal(module.effective_weight(), effective[name])  # not applied a second time
        if method != "lora":
            torch.testing.assert_close(magnitude(module.base.weight), module.magnitude.data)

    assert unmerge(model) is model
    assert torch.equal(model(TOKENS).logits, before)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


@every_adapter
def test_a_bfloat16_base_is_restored_exactly_too(method):
    model = attach(tiny_llama(torch.bfloat16).eval(), CONFIGS[method])
    move_away_from_start(model)
    before, weights = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    merged = merge(model)(TOKENS).logits
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, before, rtol=0.05, atol=0.1)  # W' is rounded to bfloat16
    assert all(torch.equal(value, weights[name]) for name, value in unmerge(model).state_dict().items())


def test_a_merged_model_can_change_precision_and_be_unmerged():
    model = merge(attach(tiny_llama(), CONFIGS["dora"])).double()
    assert {p.dtype for p in unmerge(model).parameters()} == {torch.float64}
    model(TOKENS)


def test_a_weight_shared_with_the_embedding_stays_there_when_its_adapter_is_merged():
    config = tiny_llama().config
    config.tie_word_embeddings = True
    model = type(tiny_llama())(config).eval()
    attach(model, replace(CONFIGS["dora"], target_modules=("q_proj", "lm_head")))
    move_away_from_start(model)
    shared, embedded = model.model.embed_tokens.weight, model.model.embed_tokens.weight.detach().clone()
    assert model.lm_head.base.weight is shared
    before = model(TOKENS).logits
    merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedded)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert model.lm_head.base.weight is shared and torch.equal(shared, embedded)
    torch.testing.assert_close(model(TOKENS).logits, before)


def test_merging_in_the_wrong_state_is_an_error():
    with pytest.raises(ValueError, match="no adapters: attach"):
        merge(tiny_llama())
    model = attach(tiny_llama(), CONFIGS["dora"])
    with pytest.raises(ValueError, match="not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(ValueError, match="merged already: unmerge first"):
        merge(model)
    unmerge(model)
    with pytest.raises(ValueError, match="not merged"):
        unmerge(model)


# --- Errors ---

LOW = {"method": "dora", "rank": 2, "alpha": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dorra"}, "unknown method 'dorra': choose one of full, lora, dora, dora-magnitude"),
        ({"method": "lora", "alpha": 8}, "rank must be a whole number of at least 1 for lora, got None"),
        ({"method": "dora", "rank": 0, "alpha": 8}, "rank must be a whole number of at least 1 for dora, got 0"),
        ({"method": "dora", "rank": 4.0, "alpha": 8}, r"whole number of at least 1 for dora, got 4\.0"),
        ({"method": "dora", "rank": True, "alpha": 8}, "whole number of at least 1 for dora, got True"),
        ({"method": "lora", "rank": 4}, "alpha must be a number above 0 for lora, got None"),
        ({"method": "lora", "rank": 4, "alpha": 0}, "alpha must be a number above 0 for lora, got 0"),
        ({"method": "lora", "rank": 4, "alpha": float("nan")}, "alpha must be a number above 0"),
        ({"method": "full", "rank": 4}, "'full' has no low-rank matrices: leave rank and alpha out"),
        ({"method": "dora-magnitude", "alpha": 4}, "'dora-magnitude' has no low-rank matrices"),
        ({"method": "full", "dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1\.0"),
        ({"method": "full", "dropout": -0.1}, "dropout must be at least 0"),
        ({"method": "full", "target_modules": "q_proj"}, "must be a list of layer names .* got 'q_proj'"),
        ({"method": "full", "target_modules": []}, "must be a list of layer names"),
        ({"method": "full", "target_modules": [1]}, r"must be a list of layer names .* got \[1\]"),
        ({"method": "full", "target_modules": 5}, "must be a list of layer names .* got 5"),
        ({"method": "full", "dropout": "x"}, "dropout must be at least 0 and below 1, got 'x'"),
        ({"method": "dora", "rank": 2, "alpha": "x"}, "alpha must be a number above 0 for dora, got 'x'"),
        (LOW | {"rank_pattern": {"q_proj": 0}}, "rank_pattern: the rank of 'q_proj' must be a whole number above 0"),
        (LOW | {"alpha_pattern": {"q_proj": -1}}, "alpha_pattern: the alpha of 'q_proj' must be a number above 0"),
        (LOW | {"alpha_pattern": {"q_proj": "x"}}, "alpha of 'q_proj' must be a number above 0, got 'x'"),
    ],
)
def test_a_configuration_that_makes_no_adapter_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**values)


@pytest.mark.parametrize(("pattern", "value"), [("rank_pattern", 4), ("alpha_pattern", 8), ("method_pattern", "lora")])
def test_patterns_are_checked_alike_and_are_the_configurations_own(pattern, value):
    for key in ("(", "(?i)q_proj", "q{99999999999999999999}"):  # a flag is no error until it is behind the name's begin
        with pytest.raises(ValueError, match=f"{pattern}: .* is no regular expression"):
            AdapterConfig(**LOW, **{pattern: {key: value}})
    for wrong, message in (([1], "must map the ends of modules' names"), ({1: value}, "must be a text, got 1")):
        with pytest.raises(ValueError, match=f"{pattern}.*{message}"):
            AdapterConfig(**LOW, **{pattern: wrong})
    given = {"v_proj": value, "q_proj": value}
    config = AdapterConfig(**LOW, **{pattern: given})
    given["("] = "anything"
    assert list(getattr(config, pattern)) == ["v_proj", "q_proj"]  # of these the first that fits counts


def test_scaling_is_alpha_over_rank():
    assert AdapterConfig("dora", 16, 32).scaling == 2
    with pytest.raises(ValueError, match="'dora-magnitude' has no low-rank matrices, so no scaling"):
        _ = AdapterConfig("dora-magnitude").scaling
    assert AdapterConfig("lora", 1, 1, target_modules=["q_proj"]).target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"target_modules": ["q_proj", "query"]},
            "'query' is not in the model: its linear layers are .*down_proj, .*q_",
        ),
        ({"target_modules": ["proj"]}, "'proj' is not in the model"),  # whole name components, not any ending
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens is a Embedding: only linear layers"),
        ({"rank": 9}, r"rank 9 is too large for module model.layers.0.self_attn.k_proj \(16 -> 8\).* at most 8"),
    ],
)
def test_attach_names_the_module_and_leaves_the_model_alone(values, message):
    model = tiny_llama()
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        attach(model, AdapterConfig(**{"method": "dora", "rank": 2, "alpha": 4} | values))
    assert model.state_dict().keys() == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    attach(model, CONFIGS["dora"])


@pytest.mark.parametrize("first", [AdapterConfig("full"), CONFIGS["lora"]])
def test_attaching_twice_is_refused(first):
    model = attach(tiny_llama(), first)
    with pytest.raises(ValueError, match=f"adapted already \\({first.method}\\): load the base model anew"):
        attach(model, CONFIGS["dora"])


def test_a_target_may_be_a_whole_path():
    model = tiny_llama()
    config = AdapterConfig("dora", 2, 4, target_modules=("layers.1.self_attn.q_proj", "down_proj"))
    assert list(find_targets(model, config)) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert list(adapted_modules(attach(model, config))) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
