"""Ranks within a budget: the arithmetic as properties, the criteria in closed form, and PEFT's patterns as ours."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_lab.adapters import AdapterConfig, adapted_modules, attach, trainable_parameters
from dora_lab.kernels import features_of
from dora_lab.models import load_base
from dora_lab.probes import activation_spectra, gradient_spectra, target_linears, update_spectra
from dora_lab.ranks import (
    CRITERIA,
    MEASURES,
    adapter_parameters,
    allocate_ranks,
    component_values,
    greedy_ranks,
    proportional_ranks,
    reversed_ranks,
    shuffled_ranks,
    uniform_budget,
)
from dora_lab.spectra import singular_values, stable_rank
from dora_lab.trainer import collate

TARGETS = ("q_proj", "v_proj", "down_proj")
ALIKE = {name: (6, 10) for name in "abc"}  # a rank costs 16 parameters in each


@st.composite
def problems(draw):
    """(shapes, budget that gives every module rank 1, method)"""
    sides = st.integers(1, 40)
    shapes = {f"m{i}": shape for i, shape in enumerate(draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=8)))}
    method = draw(st.sampled_from(["lora", "dora"]))
    least, most = uniform_budget(shapes, 1, method), uniform_budget(shapes, 40, method)
    return shapes, draw(st.integers(least, most + 50)), method


def check_within(shapes, ranks, budget, method):
    assert list(ranks) == list(shapes)
    assert all(1 <= ranks[name] <= min(shape) for name, shape in shapes.items())
    left = budget - adapter_parameters(shapes, ranks, method)
    assert left >= 0
    assert all(sum(shape) > left for name, shape in shapes.items() if ranks[name] < min(shape))  # nothing more fits


@settings(deadline=None)
@given(problems(), st.data())
def test_proportional_ranks_stay_within_budget_and_spend_it(problem, data):
    shapes, budget, method = problem
    scores = {name: data.draw(st.floats(0, 1e6)) for name in shapes}
    ranks = proportional_ranks(shapes, budget, scores, method)
    check_within(shapes, ranks, budget, method)
    for one, shape in shapes.items():
        for other in shapes:
            if shapes[other] == shape and scores[one] > scores[other]:
                assert ranks[one] >= ranks[other]


@settings(deadline=None)
@given(problems(), st.data())
def test_greedy_ranks_stay_within_budget_and_spend_it(problem, data):
    shapes, budget, method = problem
    spectra = st.lists(st.floats(0, 100), max_size=45)
    values = {name: sorted(data.draw(spectra), reverse=True) for name in shapes}
    check_within(shapes, greedy_ranks(shapes, budget, values, method), budget, method)


@settings(deadline=None)
@given(problems(), st.integers(0, 5), st.data())
def test_controls_deal_the_same_ranks_at_the_same_cost(problem, seed, data):
    shapes, budget, method = problem
    scores = {name: data.draw(st.floats(0, 100)) for name in shapes}
    ranks = proportional_ranks(shapes, budget, scores, method)
    for dealt in (shuffled_ranks(shapes, ranks, seed), reversed_ranks(shapes, ranks)):
        assert list(dealt) == list(shapes) and sorted(dealt.values()) == sorted(ranks.values())
        assert adapter_parameters(shapes, dealt, method) == adapter_parameters(shapes, ranks, method)
        assert all(1 <= dealt[name] <= min(shape) for name, shape in shapes.items())


def test_greedy_ranks_keep_the_most_where_all_modules_cost_the_same():
    generator = random.Random(0)
    values = {name: sorted((generator.random() for _ in range(6)), reverse=True) for name in ALIKE}

    def kept(ranks):
        return sum(sum(values[name][:rank]) for name, rank in ranks.items())

    ranks = greedy_ranks(ALIKE, uniform_budget(ALIKE, 3), values)
    every = [(a, b, 9 - a - b) for a in range(1, 7) for b in range(1, 7) if 1 <= 9 - a - b <= 6]
    assert kept(ranks) == max(kept(dict(zip(ALIKE, one, strict=True))) for one in every)


@pytest.mark.parametrize(
    ("scores", "rank", "expected"),
    [
        ((1, 2, 3), 4, (2, 4, 6)),
        ((5, 5, 5), 4, (4, 4, 4)),
        ((0, 0, 0), 4, (4, 4, 4)),
        ((0, 1, 1), 3, (1, 4, 4)),
        ((1, 1, 1000), 4, (3, 3, 6)),  # the last is full at 6
        ((0.4, 1, 1.6), 1, (1, 1, 1)),
        ((1, 1, 1), 9, (6, 6, 6)),
    ],
)
def test_ranks_in_proportion(scores, rank, expected):
    budget = 16 * 3 * rank + 18
    assert tuple(proportional_ranks(ALIKE, budget, dict(zip("abc", scores, strict=True))).values()) == expected


def test_what_rounding_leaves_goes_to_the_largest_remainders_then_to_the_first():
    def ranks(budget):
        scores = {"a": 1.3, "b": 1.6, "c": 1.1}
        return tuple(proportional_ranks(ALIKE, budget, scores, "lora").values())

    assert [ranks(16 * n) for n in (3, 4, 5, 6)] == [(1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2)]
    assert tuple(proportional_ranks(ALIKE, 16 * 4 + 15, dict.fromkeys("abc", 1.0), "lora").values()) == (2, 1, 1)


def test_of_equal_components_the_module_of_the_lowest_rank_comes_first():
    flat = {name: [1.0] * 6 for name in ALIKE}
    assert [tuple(greedy_ranks(ALIKE, 16 * n, flat, "lora").values()) for n in (3, 4, 5, 7)] == [
        (1, 1, 1),
        (2, 1, 1),
        (2, 2, 1),
        (3, 2, 2),
    ]


def test_a_component_counts_for_every_parameter_it_costs():
    shapes, values = {"small": (4, 4), "large": (8, 8)}, {"small": [9, 3, 3, 3], "large": [9, 5, 5, 5]}
    assert greedy_ranks(shapes, 48, values, "lora") == {"small": 4, "large": 1}  # 3/8 a parameter against 5/16


def test_reversed_ranks():
    ranks = {"a": 1, "b": 5, "c": 2, "wide": 3}
    assert reversed_ranks(ALIKE | {"wide": (8, 8)}, ranks) == {"a": 5, "b": 1, "c": 2, "wide": 3}
    assert reversed_ranks(ALIKE | {"wide": (9, 9)}, ranks)["wide"] == 3


def test_a_budget_below_rank_one_or_scores_of_other_modules_are_refused():
    with pytest.raises(ValueError, match="47 parameters does not give rank 1 to all 3 modules: that takes 48"):
        greedy_ranks(ALIKE, 47, dict.fromkeys("abc", [1.0]), "lora")
    with pytest.raises(ValueError, match=r"not of the same modules: \['c', 'd'\]"):
        proportional_ranks(ALIKE, 100, dict.fromkeys("abd", 1.0))


# --- a model ---


@pytest.fixture(scope="module")
def tiny(tiny_base):
    return load_base(str(tiny_base))


@pytest.fixture(scope="module")
def batches(tiny):
    """Four batches of two rows of 12 and 9 tokens, the shorter one padded; the last three are labelled."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in (12, 9) * 4]
    labelled = [{"input_ids": ids, "labels": [-100] * (len(ids) - 3) + ids[-3:]} for ids in rows]
    return [collate(labelled[i : i + 2]) for i in range(0, 8, 2)]


def peft_of(model, **settings):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": list(TARGETS)} | settings
    return get_peft_model(copy.deepcopy(model), LoraConfig(**settings))


@pytest.fixture(scope="module")
def shapes(tiny):
    return {name: features_of(linear) for name, linear in target_linears(tiny[0], TARGETS).items()}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_allocation_is_what_attaching_it_trains_in_a_plain_model_and_in_pefts(
    tiny, batches, shapes, criterion, method
):
    budget = uniform_budget(shapes, 3, method) + 5
    asked = {"method": method, "target_modules": TARGETS, "scaling": 1.5, "batches": batches}
    asked["of"] = allocate_ranks(tiny[0], budget, "stable_rank", **asked)
    own = allocate_ranks(tiny[0], budget, criterion, **asked)
    check = own.trainable_parameters <= budget and own.trainable_parameters > budget - 5 - 2 * 96
    assert own.budget == budget and check and list(own.rank_pattern) == list(shapes)
    assert own.alpha_pattern == {name: 1.5 * rank for name, rank in own.rank_pattern.items()}
    patterns = {"rank_pattern": own.rank_pattern, "alpha_pattern": own.alpha_pattern}
    ours = attach(copy.deepcopy(tiny[0]), AdapterConfig(method, 1, 1.0, target_modules=TARGETS, **patterns))
    assert trainable_parameters(ours)[0] == own.trainable_parameters
    assert {module.scaling for module in adapted_modules(ours).values()} == {1.5}
    peft = peft_of(tiny[0], use_dora=method == "dora", **patterns)
    assert trainable_parameters(peft)[0] == own.trainable_parameters
    again = allocate_ranks(peft_of(tiny[0]), budget, criterion, **asked)
    assert again == own


def test_pefts_rank_pattern_and_ours_are_the_same_run(tiny, shapes, batches):
    own = allocate_ranks(
        tiny[0], uniform_budget(shapes, 3), "gradient_spectrum", target_modules=TARGETS, batches=batches
    )
    patterns = {"rank_pattern": own.rank_pattern, "alpha_pattern": own.alpha_pattern}
    assert len(set(own.rank_pattern.values())) > 1
    base = copy.deepcopy(tiny[0]).double()  # AdamW makes much of a gradient that rounding alone keeps from 0
    config = AdapterConfig("dora", 2, 4.0, target_modules=TARGETS, **patterns)
    ours = attach(copy.deepcopy(base), config, torch.Generator().manual_seed(0))
    peft = peft_of(base, **patterns).double()
    for name, module in adapted_modules(ours).items():
        other = peft.get_submodule(f"base_model.model.{name}")
        assert other.lora_A["default"].weight.shape == module.lora_A.shape
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(module.lora_A)
    losses = []
    for model in (ours, peft):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for batch in batches * 3:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.1
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batches[0]).logits, peft(**batches[0]).logits, rtol=1e-3, atol=1e-3)


def test_wrong_requests_are_answered(tiny, shapes, batches):
    budget = uniform_budget(shapes, 2)

    def asked(criterion, **settings):
        return allocate_ranks(tiny[0], budget, criterion, **{"target_modules": TARGETS} | settings)

    with pytest.raises(ValueError, match="unknown criterion 'eva': choose one of uniform, stable_rank"):
        asked("eva")
    with pytest.raises(ValueError, match="'dora-magnitude' has no ranks"):
        asked("uniform", method="dora-magnitude")
    with pytest.raises(ValueError, match="'update_spectrum' is measured: give batches"):
        asked("update_spectrum")
    with pytest.raises(ValueError, match="'shuffled' deals ranks anew"):
        asked("shuffled")
    with pytest.raises(ValueError, match="'reversed' deals ranks anew"):
        asked("reversed", of=asked("uniform"), target_modules=("q_proj",))
    with pytest.raises(ValueError, match="ranks to deal anew cost .* with dora, more than the budget of"):
        asked("shuffled", of=allocate_ranks(tiny[0], 2 * budget, "uniform", target_modules=TARGETS))
    with pytest.raises(ValueError, match="ranks to deal anew cost .* with dora, more than the budget of"):
        asked("reversed", of=allocate_ranks(tiny[0], 2 * budget, "uniform", target_modules=TARGETS, method="lora"))
    for wrong in (float("nan"), float("inf"), -1.0):
        spectra = {name: torch.tensor([1.0, wrong]) for name in shapes}
        if wrong != -1.0:  # squared, it is as good as 1
            with pytest.raises(ValueError, match="q_proj has a score that is no finite number"):
                asked("update_spectrum", spectra=spectra)
        with pytest.raises(ValueError, match="q_proj has a score that is no finite number"):
            proportional_ranks(shapes, budget, dict.fromkeys(shapes, wrong))
    with pytest.raises(ValueError, match="target module 'w_proj' is not in the model"):
        asked("uniform", target_modules=("w_proj",))
    with pytest.raises(ValueError, match="only linear layers have ranks"):
        asked("uniform", target_modules=("mlp",))
    with pytest.raises(ValueError, match="rank_pattern names 'layers.0.q_proj', which is not among the target"):
        attach(copy.deepcopy(tiny[0]), AdapterConfig("dora", 2, 4.0, rank_pattern={"layers.0.q_proj": 3}))


def test_a_name_that_ends_another_comes_after_it():
    """The first key that fits a module's name counts, here and in PEFT: `0` fits `1.0` too."""
    inner = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), inner)
    spectra = {"0": torch.arange(8.0, 0, -1), "1.0": torch.tensor([1e-3])}
    own = allocate_ranks(model, 131, "update_spectrum", target_modules=["0"], spectra=spectra)
    assert list(own.rank_pattern) == ["1.0", "0"] and own.rank_pattern["0"] > own.rank_pattern["1.0"]
    patterns = {"rank_pattern": own.rank_pattern, "alpha_pattern": own.alpha_pattern}
    config = AdapterConfig("dora", 1, 2.0, target_modules=("0",), **patterns)
    assert trainable_parameters(attach(copy.deepcopy(model), config))[0] == own.trainable_parameters <= own.budget


# --- the probes ---


@pytest.mark.parametrize("probe", list(MEASURES.values()), ids=list(MEASURES))
def test_a_probe_leaves_the_model_as_it_was(tiny, batches, probe):
    model = copy.deepcopy(tiny[0]).train()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    found = probe(model, batches, TARGETS)
    assert list(found) == list(target_linears(model, TARGETS))
    assert all((values.diff() <= 1e-12).all() and values[0] > 0 for values in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("probe", list(MEASURES.values()), ids=list(MEASURES))
def test_a_batch_without_labels_is_refused(tiny, batches, probe):
    empty = batches[0] | {"labels": torch.full_like(batches[0]["labels"], -100)}
    with pytest.raises(ValueError, match="no labelled token in a batch"):
        probe(tiny[0], [batches[0], empty], TARGETS)


def test_the_short_update_of_a_base_in_16_bits_is_not_rounded_away(tiny, batches):
    low = copy.deepcopy(tiny[0]).bfloat16()
    wide = copy.deepcopy(low).float()
    one, other = (update_spectra(model, batches, TARGETS, learning_rate=1e-5) for model in (low, wide))
    for name, values in one.items():
        torch.testing.assert_close(values, other[name])
    assert next(low.parameters()).dtype == torch.bfloat16


def test_gradients_are_autograds_mean_over_batches(tiny, batches):
    """Also of a model that has gradients of its own, which stay."""
    model = copy.deepcopy(tiny[0]).eval()
    torch.stack([model(**batch).loss for batch in batches]).mean().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found = gradient_spectra(model, batches, TARGETS)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())
    for name, values in found.items():
        expected = singular_values(model.get_submodule(name).weight.grad)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6 * expected[0].item())


def test_inputs_are_centred_and_without_padding(tiny, batches):
    name, seen = "model.layers.1.mlp.down_proj", []
    hook = tiny[0].get_submodule(name).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    with torch.no_grad():
        for batch in batches:
            for row, length in zip(batch["input_ids"], (12, 9), strict=True):
                tiny[0](row[None, :length])
    hook.remove()
    x = torch.cat(seen).double()  # (tokens, in), each row read by itself
    expected = torch.linalg.svdvals((x - x.mean(0)) / len(x) ** 0.5)
    found = activation_spectra(tiny[0], batches, ["down_proj"])[name]
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-3, atol=1e-4 * expected[0].item())


def test_one_step_of_the_short_update_is_adams_sign(tiny, batches):
    """AdamW's first step is lr·g / (|g| + ε): every entry moves by the rate, whatever its gradient's size."""
    model = copy.deepcopy(tiny[0]).eval()
    model(**batches[0]).loss.backward()
    rate, found = 1e-3, update_spectra(tiny[0], batches[:1], TARGETS, learning_rate=1e-3)
    for name, values in found.items():
        expected = singular_values(rate * model.get_submodule(name).weight.grad.sign())
        torch.testing.assert_close(values[:4], expected[:4], rtol=0.02, atol=0)


def test_quantised_weights_have_no_gradient(tiny, batches):
    model = copy.deepcopy(tiny[0])
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="q_proj is quantised and has no gradient"):
        gradient_spectra(model, batches, TARGETS)


def test_a_modules_variance_is_shared_out_whatever_its_size():
    spectra = {"small": torch.tensor([2.0, 1.0]), "large": torch.tensor([200.0, 100.0]), "none": torch.zeros(2)}
    assert component_values(spectra, "update_spectrum")["large"] == [40000.0, 10000.0]
    shares = component_values(spectra, "explained_variance")
    assert shares["small"] == shares["large"] == pytest.approx([0.8, 0.2]) and shares["none"] == [0.0, 0.0]


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_the_randomised_svd_allots_within_one_percent_of_the_exact(rank):
    """On the mini-world's own weights, whose spectra hardly fall: the hardest case for the randomised one."""
    model, _ = load_base("mini-world")
    weights = {name: linear.weight.detach() for name, linear in target_linears(model).items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    budget = uniform_budget(shapes, rank)
    exact, few = (
        {name: singular_values(weight, components) for name, weight in weights.items()} for components in (None, 32)
    )
    pairs = [
        [greedy_ranks(shapes, budget, component_values(spectra, "update_spectrum")) for spectra in (exact, few)],
        [
            proportional_ranks(shapes, budget, {name: total / first[name][0].item() ** 2 for name, total in squares})
            for first in (exact, few)
            for squares in [[(name, values.square().sum().item()) for name, values in exact.items()]]
        ],
    ]
    for one, other in pairs:
        assert sum(abs(one[name] - other[name]) for name in shapes) <= 0.01 * sum(one.values())
    assert pairs[1][0] == proportional_ranks(
        shapes, budget, {name: stable_rank(values) for name, values in exact.items()}
    )
