"""Hybrids: each module its own method, files that PEFT reads, gains against autograd, and a budget that holds."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from small_llama import as_if_trained, base_model
from torch import nn
from transformers import LlamaForCausalLM

from dora_lab import geometry, hybrids
from dora_lab.adapters import (
    AdapterConfig,
    DoRALinear,
    LoRALinear,
    MagnitudeLinear,
    adapted_modules,
    attach,
    find_targets,
    merge,
    trainable_parameters,
    unmerge,
)
from dora_lab.checkpoint import load_adapter, save_adapter
from dora_lab.data import IGNORED, load_examples
from dora_lab.evaluation import likelihood
from dora_lab.hybrids import MAGNITUDE, UPDATE, Part
from dora_lab.models import answer_loss, llama_config, load_base
from dora_lab.records import read_predictions, read_record, run_folder
from dora_lab.shapes import SHAPES
from dora_lab.training import finetune

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
MIXED = {"0.self_attn.q_proj": "frozen", "(q|k)_proj": "lora", "up_proj": "dora-magnitude"}
CLASSES = {"lora": LoRALinear, "dora": DoRALinear, "dora-magnitude": MagnitudeLinear}


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :4] = IGNORED
    return {"input_ids": ids, "labels": labels}


def hybrid(method: str = "dora", pattern=MIXED) -> LlamaForCausalLM:
    config = AdapterConfig(method, 2, 4, target_modules=TARGETS, method_pattern=pattern)
    return as_if_trained(attach(base_model(), config))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()["input_ids"]).logits


# --- A method for each module ---


def test_each_module_gets_its_own_method_and_the_first_key_counts():
    model = attach(base_model(), AdapterConfig("dora", 2, 4, target_modules=TARGETS, method_pattern=MIXED))
    modules = adapted_modules(model)
    assert "model.layers.0.self_attn.q_proj" not in modules and len(modules) == 9
    for name, module in modules.items():
        kind = name.rpartition(".")[2]
        own = "lora" if kind in ("q_proj", "k_proj") else "dora-magnitude" if kind == "up_proj" else "dora"
        assert type(module) is CLASSES[own], name
    assert torch.equal(logits(model), logits(base_model()))
    assert not any(p.requires_grad for p in model.model.layers[0].self_attn.q_proj.parameters())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_pattern_that_names_every_module_is_that_method(method):
    other = "dora" if method == "lora" else "lora"
    plain, patterned = (
        attach(base_model(), AdapterConfig(base, 2, 4, method_pattern=pattern), torch.Generator().manual_seed(3))
        for base, pattern in ((method, {}), (other, {".*": method}))
    )
    for model in (plain, patterned):
        answer_loss(model, batch())[0].backward()
    assert logits(plain).equal(logits(patterned))
    both = zip(plain.named_parameters(), patterned.named_parameters(), strict=True)
    for (name, one), (other_name, two) in both:
        assert name == other_name and one.equal(two)
        assert one.grad is two.grad is None or one.grad.equal(two.grad)


def test_the_papers_table_6_trains_the_share_that_it_prints():
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(SHAPES["llama-7b"]))
    everywhere = (*TARGETS, "o_proj", "gate_proj")
    only_m = {"(o|gate|up|down)_proj": "dora-magnitude"}
    with torch.device("meta"):
        attach(model, AdapterConfig("dora", 32, 64, target_modules=everywhere, method_pattern=only_m))
    trained, total = trainable_parameters(model)
    assert round(100 * trained / total, 2) == 0.39


def test_a_hybrid_merges_and_comes_back():
    model = hybrid()
    before, weights = logits(model), {n: m.base.weight.clone() for n, m in adapted_modules(model).items()}
    torch.testing.assert_close(logits(merge(model)), before, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert all(torch.equal(m.base.weight, weights[n]) for n, m in adapted_modules(model).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method_pattern": {"q_proj": "dorra"}},
            "unknown method 'dorra' for 'q_proj': choose one of lora, dora, dora-m",
        ),
        ({"method_pattern": {"(q": "lora"}}, r"'\(q' is no regular expression"),
        (
            {"method_pattern": {"o_proj": "lora"}},
            "method_pattern names 'o_proj', which is not among the target modules",
        ),
        ({"method_pattern": {".*": "frozen"}}, "method_pattern leaves every target module frozen"),
        ({"method": "full", "rank": None, "alpha": None, "method_pattern": {"q_proj": "lora"}}, "'full' has none"),
        (
            {"method": "dora-magnitude", "rank": None, "alpha": None, "method_pattern": {"q_proj": "lora"}},
            "lora for 'q_proj' needs a rank and an alpha: take method lora or dora",
        ),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(settings, message):
    values = {"method": "dora", "rank": 2, "alpha": 4, "target_modules": TARGETS} | settings
    with pytest.raises(ValueError, match=message):
        find_targets(base_model(), AdapterConfig(**values))


# --- Through files ---


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("dora", MIXED),
        ("lora", {"v_proj": "dora"}),
        ("lora", {"v_proj": "frozen"}),
        ("dora", {".*": "lora"}),
        ("dora-magnitude", {"v_proj": "frozen"}),
        ("dora", {"layers.1.mlp.up_proj": "dora", "up_proj": "dora-magnitude", ".*_proj": "lora"}),
    ],
    ids=["all-four", "lora-and-dora", "lora-and-frozen", "all-lora", "m-and-frozen", "overlapping"],
)
def test_a_hybrid_goes_to_peft_and_comes_back(method, pattern, tmp_path):
    if method == "dora-magnitude":
        model = attach(base_model(), AdapterConfig(method, target_modules=TARGETS, method_pattern=pattern))
    else:
        model = hybrid(method, pattern)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    back = load_adapter(base_model(), tmp_path)
    assert torch.equal(logits(back), logits(model))
    assert back.adapter_config.method_pattern == pattern
    attached = attach(base_model(), model.adapter_config)
    assert torch.equal(logits(load_adapter(attached, tmp_path)), logits(model))


def test_another_pattern_is_refused(tmp_path):
    save_adapter(hybrid(), tmp_path)
    with pytest.raises(ValueError, match="has method_pattern .* but the model's has {'up_proj': 'lora'}"):
        load_adapter(hybrid(pattern={"up_proj": "lora"}), tmp_path)


@pytest.mark.parametrize("initialisation", ["kaiming", "pissa"])
def test_a_run_trains_a_hybrid_records_it_and_saves_what_answers_the_same(initialisation, tiny_spec, tmp_path):
    pattern = {"0.self_attn.(q|k|v)_proj": "lora", "up_proj": "dora-magnitude", "1.mlp.down_proj": "frozen"}
    spec = tiny_spec(method_pattern=pattern, initialisation=initialisation)
    record = finetune(spec, tmp_path, progress=False)
    folder = run_folder(tmp_path, spec)
    assert read_record(folder) == record and record.spec.method_pattern == pattern
    model, tokenizer = load_base(spec.base_model)
    load_adapter(model, folder / "adapter").eval()
    assert record.result.trainable_parameters == trainable_parameters(attach_anew(spec))[0]
    questions = load_examples(spec.data, spec.task, "test")
    again = likelihood(model, tokenizer, questions, spec.prompt, spec.evaluation_batch_size)
    for one, row in zip(again, read_predictions(folder), strict=True):
        assert one.log_likelihoods == pytest.approx(row["log_likelihoods"], abs=1e-3), one.id


def attach_anew(spec):
    return attach(load_base(spec.base_model)[0], spec.adapter_config)


# --- Gains ---


def measured(seed: int = 0, batches=None) -> list[Part]:
    config = AdapterConfig("dora", 2, 4, target_modules=TARGETS)
    return hybrids.measure_parts(base_model(), config, batches or [batch(0), batch(1)], seed)


def test_gains_are_the_gradients_that_autograd_finds_for_w0():
    model, labelled = base_model(), 0
    for one in (batch(0), batch(1)):
        loss, count = answer_loss(model, one)
        loss.backward()
        labelled += count
    start = attach(base_model(), AdapterConfig("dora", 2, 4, target_modules=TARGETS), torch.Generator().manual_seed(0))
    found = {(part.module, part.kind): part for part in measured()}
    for name, module in adapted_modules(start).items():
        weight, A = model.get_submodule(name).weight, module.lora_A
        gradient = weight.grad / labelled  # (out, in)
        update = (2 * gradient @ A.T).abs().sum()  # of B = 0: s·∇W'·Aᵀ; that of A is 0
        magnitude = (gradient * weight).sum(1) / geometry.magnitude(weight)  # (out,)
        torch.testing.assert_close(found[name, UPDATE].gain, update.item(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name, MAGNITUDE].gain, magnitude.abs().sum().item(), rtol=1e-4, atol=1e-6)
        assert found[name, UPDATE].parameters == A.numel() + module.lora_B.numel()
        assert found[name, MAGNITUDE].parameters == weight.shape[0]


def fall_of_first_step(method: str, rate: float) -> float:
    """By how much the loss per token falls in AdamW's first step, in nats."""
    low_rank = (2, 4) if method != "dora-magnitude" else ()
    config = AdapterConfig(method, *low_rank, target_modules=TARGETS)
    model = attach(base_model().double(), config, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, eps=1e-30, weight_decay=0)
    before, labelled = answer_loss(model, batch())
    before.backward()
    optimizer.step()
    return (before - answer_loss(model, batch())[0]).item() / labelled


@pytest.mark.parametrize("method, kind", [("lora", UPDATE), ("dora-magnitude", MAGNITUDE)])
def test_adamws_first_step_lowers_the_loss_by_rate_times_gain(method, kind):
    promised = 1e-5 * sum(part.gain for part in measured(batches=[batch()]) if part.kind == kind)
    assert fall_of_first_step(method, 1e-5) == pytest.approx(promised, rel=0.01)


def test_with_both_parts_the_norm_takes_back_what_the_update_adds_along_w0():
    model, taken_back = base_model(), 0.0
    loss, labelled = answer_loss(model, batch())
    loss.backward()
    start = attach(base_model(), AdapterConfig("dora", 2, 4, target_modules=TARGETS), torch.Generator().manual_seed(0))
    for name, module in adapted_modules(start).items():
        weight, A = model.get_submodule(name).weight, module.lora_A
        gradient, unit = weight.grad / labelled, weight / geometry.magnitude(weight)[:, None]  # (out, in)
        step = 2 * (gradient @ A.T).sign() @ A  # (out, in): how W' moves for a unit of learning rate
        taken_back += ((gradient * unit).sum(1) * (step * unit).sum(1)).sum().item()
    gains = sum(part.gain for part in measured(batches=[batch()]))
    assert fall_of_first_step("dora", 1e-5) == pytest.approx(1e-5 * (gains - taken_back), rel=0.01)
    assert abs(taken_back) < 0.1 * gains


def test_pooled_gains_are_mean_shares():
    first = [Part("a", UPDATE, 4, 3.0), Part("a", MAGNITUDE, 2, 1.0)]
    second = [Part("a", UPDATE, 4, 10.0), Part("a", MAGNITUDE, 2, 30.0)]
    assert [part.gain for part in hybrids.pooled([first, second])] == [0.5, 0.5]
    with pytest.raises(ValueError, match="not of the same parts"):
        hybrids.pooled([first, second[:1]])


def test_what_gives_no_gains_is_refused():
    with pytest.raises(ValueError, match="no labelled token"):
        measured(batches=[{"input_ids": batch()["input_ids"], "labels": torch.full((3, 7), IGNORED)}])
    with pytest.raises(ValueError, match="measured with method dora on every target"):
        hybrids.measure_parts(base_model(), AdapterConfig("lora", 2, 4), [batch()])


# --- The choice ---

SIZES = ((8, 3), (8, 3), (8, 3), (12, 5), (12, 5), (20, 1))  # of update and magnitude, module by module
gains = st.lists(st.floats(0, 1e3), min_size=2 * len(SIZES), max_size=2 * len(SIZES))


def parts_with(values: list[float]) -> list[Part]:
    sizes = [(f"{i}.proj", kind, own[kind == MAGNITUDE]) for i, own in enumerate(SIZES) for kind in (UPDATE, MAGNITUDE)]
    return [Part(*what, gain) for what, gain in zip(sizes, values, strict=True)]


TOTAL = sum(map(sum, SIZES))


@given(gains, st.integers(1, TOTAL))
def test_a_budget_is_never_passed_and_no_part_left_out_would_fit(values, budget):
    parts = parts_with(values)
    methods = hybrids.choose_methods(parts, budget)
    spent = hybrids.parameters_of(methods, parts)
    assert 0 < spent <= budget and list(methods) == [f"{i}.proj" for i in range(len(SIZES))]
    kinds = {method: kinds for kinds, method in hybrids.METHOD_OF.items()}
    for part in parts:
        if part.kind not in kinds[methods[part.module]]:
            assert part.parameters > budget - spent
            # and what was taken in its place is worth no less
            better = [p for p in parts if p.kind in kinds[methods[p.module]] and p.worth >= part.worth]
            assert sum(p.parameters for p in better) + part.parameters > budget


@given(gains, st.integers(1, TOTAL), st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_scale_of_the_loss_does_not_matter(values, budget, scale):
    scaled = [value * scale for value in values]
    assert hybrids.choose_methods(parts_with(values), budget) == hybrids.choose_methods(parts_with(scaled), budget)


@given(gains, st.integers(1, TOTAL), st.integers(0, 20))
def test_the_control_has_the_same_methods_on_modules_of_the_same_size(values, budget, seed):
    parts = parts_with(values)
    methods = hybrids.choose_methods(parts, budget)
    dealt = hybrids.shuffled(methods, parts, seed)
    assert dealt == hybrids.shuffled(methods, parts, seed)
    assert hybrids.parameters_of(dealt, parts) == hybrids.parameters_of(methods, parts)
    for alike in ("012", "34", "5"):
        assert Counter(dealt[f"{i}.proj"] for i in alike) == Counter(methods[f"{i}.proj"] for i in alike)


def test_the_control_moves_methods():
    methods = dict(
        zip([f"{i}.proj" for i in range(6)], ["dora", "lora", "frozen", "dora", "lora", "dora"], strict=True)
    )
    dealt = [hybrids.shuffled(methods, parts_with([1.0] * 12), seed) for seed in range(10)]
    assert len({tuple(one.values()) for one in dealt}) > 3


def test_the_whole_budget_is_dora_everywhere_and_the_best_part_comes_first():
    parts = parts_with([float(i) for i in range(12)])
    assert set(hybrids.choose_methods(parts, TOTAL).values()) == {"dora"}
    alone = hybrids.choose_methods(parts, 1)  # the last module's m: 11 for one parameter
    assert alone == dict.fromkeys([f"{i}.proj" for i in range(5)], "frozen") | {"5.proj": "dora-magnitude"}
    with pytest.raises(ValueError, match="a budget of 0 parameters buys nothing: the cheapest part has 1"):
        hybrids.choose_methods(parts, 0)


def test_what_was_chosen_trains_as_many_parameters_as_was_counted():
    parts = measured()
    methods = hybrids.choose_methods(parts, 500)
    pattern = {name.replace("model.", ""): method for name, method in methods.items()}
    model = attach(base_model(), AdapterConfig("dora", 2, 4, target_modules=TARGETS, method_pattern=pattern))
    assert trainable_parameters(model)[0] == hybrids.parameters_of(methods, parts) <= 500
