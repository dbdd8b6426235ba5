"""The fast DoRA product against the plain one: outputs, gradients, what is saved, and a norm that is never stale."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_lab.adapters import AdapterConfig, DoRALinear, adapted_modules, attach, dora_norm, dora_weight, merge, unmerge
from dora_lab.geometry import magnitude
from dora_lab.kernels import NormCache, adapted_norm, dora_product, squared_norm


def layer(out=7, inn=5, rank=3, bias=True, dtype=torch.float32, dropout=0.0, seed=0, **changes):
    """A DoRA layer with values as after some training."""
    torch.manual_seed(seed)
    base = nn.Linear(inn, out, bias=bias, dtype=dtype).requires_grad_(False)
    made = DoRALinear(base, AdapterConfig("dora", rank, 2 * rank, dropout, **changes))
    nn.init.normal_(made.lora_B, std=0.3)
    with torch.no_grad():
        made.magnitude.mul_(0.5 + torch.rand(out)).mul_(torch.where(torch.rand(out) < 0.2, -1.0, 1.0))
    return made


def exact(made: DoRALinear, x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(y, gradients of x, m, A and B) of Eq. 5 and Eq. 11 in float64 by plain autograd."""
    values = [x, made.magnitude, made.lora_A, made.lora_B]
    x, m, A, B = (value.detach().double().requires_grad_() for value in values)
    weight = dora_weight(made.base.weight.double(), m, A, B, made.scaling)
    bias = None if made.base.bias is None else made.base.bias.double()
    y = F.linear(x, weight, bias)
    return y.detach(), list(torch.autograd.grad(y, [x, m, A, B], gradient.double()))


def sizes_of_terms(made: DoRALinear, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """The sums of `exact` with every term's absolute value: rounding errors are in proportion to these, because terms
    that cancel leave their errors behind."""
    values = [x, made.magnitude, made.lora_A, made.lora_B]
    x, m, A, B = (value.detach().double().abs().requires_grad_() for value in values)
    norm = dora_norm(made.base.weight.double() + made.scaling * made.lora_B.double() @ made.lora_A.double()).detach()
    weight = (m / norm)[:, None] * (made.base.weight.double().abs() + made.scaling * B @ A)
    y = F.linear(x, weight, None if made.base.bias is None else made.base.bias.double().abs())
    return [y.detach(), *torch.autograd.grad(y, [x, m, A, B], gradient.double().abs())]


def close(actual, expected, tolerance, sizes=None):
    for a, b, size in zip(actual, expected, sizes or expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * size.norm() + 1e-12


# --- The same output and the same gradients ---


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(2, 24), st.integers(2, 24)),
    rank=st.integers(1, 8),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    batch=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4)]),
    seed=st.integers(0, 1000),
)
def test_output_and_gradients_are_those_of_the_formula(sizes, rank, bias, dtype, batch, seed):
    made = layer(*sizes, min(rank, *sizes), bias, dtype, seed=seed)
    x = torch.randn(*batch, sizes[1], dtype=dtype, requires_grad=True)
    gradient = torch.randn(*batch, sizes[0], dtype=dtype)
    y, gradients = exact(made, x, gradient)
    mine = made(x)
    assert mine.dtype == dtype and mine.shape == gradient.shape
    found = torch.autograd.grad(mine, [x, made.magnitude, made.lora_A, made.lora_B], gradient)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 0.02}[dtype]
    close([mine, *found], [y, *gradients], tolerance, sizes_of_terms(made, x, gradient))


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    torch.manual_seed(1)
    shapes = {"base_output": (2, 3, 6), "hidden": (2, 3, 2), "B": (6, 2), "m": (6,)}
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    norm, b = torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(6, dtype=torch.float64) if bias else None
    assert torch.autograd.gradcheck(lambda *v: dora_product(*v, norm, 1.5, b), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_m_is_zero_its_gradient_is_still_right(dtype):
    made = layer(dtype=dtype)
    with torch.no_grad():
        made.magnitude[[0, 4]] = 0
    x, gradient = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 7, dtype=dtype)
    y, (_, in_m, in_A, in_B) = exact(made, x, gradient)
    made(x).backward(gradient)
    assert in_m[0] != 0 and in_m[4] != 0
    found = [made.magnitude.grad, made.lora_A.grad, made.lora_B.grad]
    close(found, [in_m, in_A, in_B], 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dropout_on", ["low-rank", "faithful"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_fast_kernel_equals_the_reference_with_dropout_and_autocast(dropout_on, autocast):
    found = []
    for kernel in ("fast", "reference"):
        made = layer(12, 10, dropout=0.3, dropout_on=dropout_on, kernel=kernel)
        x = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(3)).requires_grad_()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = made(x)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, made.magnitude.grad, made.lora_A.grad, made.lora_B.grad])
    for fast, plain in zip(*found, strict=True):
        assert (fast - plain).norm() <= (0.03 if autocast else 1e-5) * plain.norm()


# --- The norm ---


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    shrink=st.sampled_from([0.0, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_dense_and_factored_norms_are_the_exact_one(sizes, rank, dtype, shrink, seed):
    torch.manual_seed(seed)
    weight = torch.randn(sizes).to(dtype)
    weight[0] = 0
    B, A = torch.linalg.qr(torch.randn(sizes[0], sizes[0]))[0], torch.randn(rank, sizes[1])
    B = torch.randn(sizes[0], rank) if shrink == 0 else -shrink * (weight.float() @ torch.linalg.pinv(A))
    truth = torch.linalg.vector_norm(weight.double() + 0.7 * B.double() @ A.double(), dim=1)
    for kind in ("dense", "factored"):
        found = adapted_norm(weight, A, B, 0.7, squared_norm(weight), kind)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        expected = torch.where(truth == 0, 1.0, truth)
        near = (found - expected).abs() <= 2e-4 * expected + 1e-5
        assert (near | (truth < 1e-5)).all(), (kind, found, expected)


def test_without_an_update_the_norm_is_the_magnitude_to_the_last_bit():
    made = layer(64, 48)
    nn.init.zeros_(made.lora_B)
    assert torch.equal(made.cache.norm(made.base, made.lora_A, made.lora_B, 2.0), magnitude(made.base.weight))


def test_micro_batches_and_recomputation_share_one_norm():
    made = layer(16, 12)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        for reentrant in (False, True, False, True):
            x = torch.randn(4, 12, requires_grad=True)
            checkpoint(made, x, use_reentrant=reentrant).square().sum().backward()
        assert made.cache.computed == step + 1
        optimizer.step()
        optimizer.zero_grad()


def _edit(parameter):
    with torch.no_grad():
        parameter.mul_(1.1)


def _data_step(made):
    """An optimizer that writes through .data, as some do: no version counter sees it."""

    class Data(torch.optim.Optimizer):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(0.9)

    Data([made.lora_A, made.lora_B], {}).step()


ACTIONS = {
    "forward": lambda made: made(torch.randn(3, 12)),
    "backward": lambda made: made(torch.randn(3, 12)).sum().backward(),
    "optimizer step": lambda made: torch.optim.SGD([made.lora_A, made.lora_B], 0.1).step(),
    "fused step": lambda made: torch.optim.AdamW([made.lora_A, made.lora_B, made.magnitude], 0.1, fused=True).step(),
    "data step": _data_step,
    "load": lambda made: made.load_state_dict({k: 1.05 * v for k, v in made.state_dict().items()}),
    "edit A": lambda made: _edit(made.lora_A),
    "edit B": lambda made: _edit(made.lora_B),
    "edit base": lambda made: _edit(made.base.weight),
    "replace A": lambda made: setattr(made.lora_A, "data", made.lora_A.data * 0.9),
    "new B": lambda made: setattr(made, "lora_B", nn.Parameter(made.lora_B.detach() * 1.2)),
    "eval": lambda made: made.eval(),
    "train": lambda made: made.train(),
    "inference": lambda made: torch.inference_mode()(made)(torch.randn(2, 12)),
    "half and back": lambda made: made.bfloat16().float(),
    "merge and unmerge": lambda made: unmerge(merge(nn.Sequential(made))),
}


def check_fresh(made):
    x = torch.randn(4, 12)
    expected = F.linear(x, made.effective_weight(), made.base.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ACTIONS)
def test_no_order_of_calls_leaves_a_stale_norm(first):
    made = layer(16, 12)
    for second, third in itertools.product(ACTIONS, repeat=2):
        for action in (first, second, third):
            if made.lora_A.grad is None:  # SGD and AdamW pass over parameters without gradients
                ACTIONS["backward"](made)
            ACTIONS[action](made)
        check_fresh(made)
        if not 0.1 < made.effective_weight().norm() < 100:  # keep the numbers ordinary
            made = layer(16, 12)


def test_every_action_is_checked_after_every_single_one():
    made = layer(16, 12)
    for action in list(ACTIONS) * 2:
        ACTIONS["backward"](made)
        ACTIONS[action](made)
        check_fresh(made)


def test_an_edit_through_data_needs_forget():
    made = layer(16, 12)
    made(torch.randn(1, 12))
    made.lora_B.data.mul_(3)
    made.cache.forget()
    check_fresh(made)


def test_the_frozen_bases_norm_is_taken_once(monkeypatch):
    calls = []
    monkeypatch.setattr("dora_lab.kernels.squared_norm", lambda w: calls.append(1) or squared_norm(w))
    made = layer(16, 12)
    for _ in range(3):
        ACTIONS["backward"](made)
        ACTIONS["optimizer step"](made)
    assert len(calls) == 1


# --- What is saved ---


def saved_bytes(run) -> int:
    """Bytes that autograd keeps, memory that is shared counted once, parameters not at all."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter) and tensor.numel() > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())


def test_a_layer_saves_what_lora_saves_and_its_output_at_most():
    torch.manual_seed(0)
    base = nn.Linear(64, 96, bias=False).requires_grad_(False)
    x = torch.randn(50, 64, requires_grad=True)
    sizes = {}
    for method in ("lora", "dora"):
        model = attach(nn.Sequential(copy.deepcopy(base)), AdapterConfig(method, 4, 8, target_modules=("0",)))
        model(x)  # the norm is there
        sizes[method] = saved_bytes(lambda model=model: model(x))
    small = 4 * 96 * 8  # vectors of the size of m, and s·B
    assert sizes["dora"] <= sizes["lora"] + 50 * 96 * 4 + small


# --- Company ---


def test_deepcopy_pickle_and_state_dict():
    made = layer(16, 12)
    x = torch.randn(3, 12)
    expected = made(x).detach()
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for other in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected) and other.cache is not made.cache
        _edit(other.lora_B)
        assert torch.equal(made(x), expected)
        check_fresh(other)
    other = layer(16, 12, seed=4)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), expected)
    assert set(made.state_dict()) == {"base.weight", "base.bias", "lora_A", "lora_B", "magnitude"}


def test_the_cache_of_a_copy_is_empty():
    made = layer()
    made(torch.randn(2, 5))
    assert made.cache._kept and not copy.deepcopy(made).cache._kept
    assert isinstance(copy.copy(made.cache), NormCache)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_torch_compile(bias):
    made, x = layer(32, 24, bias=bias), torch.randn(6, 24, requires_grad=True)
    expected = made(x)
    gradient = torch.randn_like(expected)
    variables = [x, made.magnitude, made.lora_A, made.lora_B]
    plain = torch.autograd.grad(expected, variables, gradient)
    compiled = torch.compile(made, fullgraph=True)
    for _ in range(2):
        found = compiled(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found, variables, gradient), plain, rtol=1e-4, atol=1e-5)
    _edit(made.lora_B)
    torch.testing.assert_close(compiled(x), made(x), rtol=1e-4, atol=1e-5)


def test_a_hook_on_the_base_may_keep_its_output():
    made, kept = layer(bias=False), []
    made.base.register_forward_hook(lambda module, args, output: kept.append(output))
    x = torch.randn(2, 5)
    made(x)
    assert torch.equal(kept[0], F.linear(x, made.base.weight))


def test_ten_steps_stay_beside_the_reference():
    models = []
    for kernel in ("fast", "reference"):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 4))
        attach(model, AdapterConfig("dora", 3, 6, target_modules=("0", "2"), kernel=kernel), torch.Generator())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        generator = torch.Generator().manual_seed(8)
        for _ in range(10):
            x = torch.randn(32, 12, generator=generator)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for a, b in zip(*(adapted_modules(model).values() for model in models), strict=True):
        torch.testing.assert_close(dict(a.named_parameters()), dict(b.named_parameters()), rtol=1e-4, atol=1e-5)
        assert (dora_norm(a.effective_weight()) - a.magnitude.abs()).abs().max() < 1e-5
