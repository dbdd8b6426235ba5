"""The self-checks: every right answer passes, every known mistake is told by its name. The solutions live here only."""

import math

import numpy as np
import pytest
import torch

from dora_lab.exercises import EXERCISES, check, hint
from dora_lab.exercises import _hints_shown as hints_shown


def rows(W):
    return W.norm(dim=1, keepdim=True)


def naive(W0, m, A, B, s):
    V = W0 + s * B @ A
    return m[:, None] * V / rows(V)


def forward(x, W0, m, A, B, s):
    V = W0 + s * B @ A
    return x @ (m[:, None] * V / rows(V).detach()).T


def forward_output_form(x, W0, m, A, B, s):
    norm = (W0 + s * B @ A).norm(dim=1).detach()
    return (m / norm) * (x @ W0.T + s * (x @ A.T) @ B.T)


def gradient_eq6(grad, V, m):
    n = rows(V)
    unit = V / n
    return m[:, None] / n * (grad - (grad * unit).sum(1, keepdim=True) * unit)


def tail(target, rank):
    return torch.linalg.svdvals(target)[rank:].norm()


def start(W0, rank):
    return W0.norm(dim=1), torch.randn(rank, W0.shape[1]), torch.zeros(W0.shape[0], rank)


def dora_count(shapes, rank):
    return sum(rank * (out + inside) + out for out, inside in shapes)


def questions_needed(points, discordance):
    d = points / 100
    return math.ceil(1.96**2 * (discordance - d**2) / d**2)


def choose(candidates):
    sums = [sum(tokens) for tokens in candidates]
    means = [sum(tokens) / len(tokens) for tokens in candidates]
    return sums.index(max(sums)), means.index(max(means))


def majority(train, test):
    answer = max(set(train), key=train.count)
    return sum(a == answer for a in test) / len(test)


def best_by_form(forms, labels):
    own = {form: [lab for f, lab in zip(forms, labels, strict=True) if f == form] for form in forms}
    return sum(max(group.count(label) for label in group) for group in own.values()) / len(labels)


def trained_by(out, inside, rank, method):
    return {"lora": rank * (out + inside), "dora": rank * (out + inside) + out, "dora-magnitude": out, "frozen": 0}[
        method
    ]


def spend(costs, gains, budget, order=None, full=False):
    order, taken = order or sorted(range(len(costs)), key=lambda i: gains[i] / costs[i], reverse=True), []
    for i in order:
        if sum(costs[j] for j in taken) + (0 if full else costs[i]) <= budget - full:
            taken.append(i)
    return taken


def reading(r, low, high):
    return "undecided" if low <= 0 <= high else "together" if r > 0 else "against"


def effective(values):
    shares = torch.tensor(values / values.sum())
    return torch.distributions.Categorical(probs=shares).entropy().exp().item()


def best_buy(values, shapes):
    return max(range(len(values)), key=lambda i: values[i] / sum(shapes[i]))


RIGHT = {
    "01.1": [8 * (4096 + 1024)],
    "01.2": [lambda A, B, alpha, rank: alpha / rank * B @ A],
    "01.3": [tail, lambda target, rank: torch.linalg.svdvals(target)[rank:].square().sum().sqrt().item()],
    "01.4": [511, torch.tensor(511)],
    "02.1": [rows_ := lambda W: W.norm(dim=1), lambda W: (W * W).sum(1).sqrt()],
    "02.2": [lambda W: (W.norm(dim=1), W / rows(W)), lambda W: [rows_(W), torch.nn.functional.normalize(W, dim=1)]],
    "02.3": [lambda W, W0: 1 - torch.cosine_similarity(W, W0, dim=1).mean().item()],
    "02.4": [gradient_eq6],
    "03.1": [start],
    "03.2": [naive],
    "03.3": [forward, forward_output_form],
    "03.4": [
        lambda base, low, gain, bias: gain * (base - bias + low) + bias,
        lambda base, low, gain, bias: base + (gain - 1) * (base - bias) + gain * low,
    ],
    "03.5": [lambda W0, m, A, B, alpha, rank: naive(W0, m, A, B, alpha / rank)],
    "04.1": [dora_count],
    "04.2": [lambda trainable, base: 100 * trainable / (trainable + base)],
    "04.3": [{"lora_A", "lora_B", "magnitude"}, ["magnitude", "lora_B", "lora_A"]],
    "05.2": [lambda counts: sum(1 / c for c in counts) / len(counts), lambda counts: np.mean(1 / np.array(counts))],
    "05.3": [questions_needed, lambda d, c: 1.959964**2 * (c - (d / 100) ** 2) / (d / 100) ** 2],
    "05.1": [choose],
    "06.1": [majority],
    "06.2": [best_by_form],
    "09.1": [lambda d, m: np.corrcoef(d, m)[0, 1]],
    "09.2": [reading],
    "13.1": [effective, lambda values: (p := values / values.sum()).size and np.prod(p**-p)],
    "13.2": [best_buy],
    "14.1": [trained_by],
    "14.2": [spend],
}
# (wrong answer, expected diagnosis), written anew: not the declarations' own. None: wrong, and of no known kind.
WRONG = {
    "01.1": [
        (8 * 1024, "only A counted"),
        (8 * 4096, "only B counted"),
        (4096 * 1024, "product counted"),
        (4096 + 1024, "rank left out"),
        (40961, None),
        ("many", None),
    ],
    "01.2": [
        (lambda A, B, alpha, rank: B @ A * alpha, "alpha without / r"),
        (lambda A, B, alpha, rank: torch.einsum("or,ri->oi", B, A), "scaling left out"),
        (lambda A, B, alpha, rank: (B @ A) * rank / alpha, "alpha and r swapped"),
        (lambda A, B, alpha, rank: A.T @ B.T * alpha / rank, "transposed"),
        (lambda A, B, alpha, rank: A @ B * alpha / rank, None),
        (4.0, None),
    ],
    "01.3": [
        (lambda T, r: tail(T, r) ** 2, "squared norm instead of norm"),
        (lambda T, r: torch.linalg.svdvals(T)[:r].norm(), "kept part instead of lost part"),
        (lambda T, r: torch.linalg.svd(T)[1][r].item(), "spectral norm"),
        (lambda T, r: torch.linalg.svdvals(T)[r:].sum(), "singular values added"),
        (lambda T, r: tail(T, r + 1), "one rank off"),
        (lambda T, r: tail(T, r) / T.norm(), "relative error"),
        (lambda T, r: tail(T, r - 1), None),
    ],
    "01.4": [
        (512, "break-even counted"),
        (1023, "only one factor"),
        (1024, "full rank"),
        (10, "the 98 % example"),
        (510, None),
    ],
    "02.1": [
        (lambda W: torch.linalg.vector_norm(W, dim=0), "norm over the wrong axis"),
        (lambda W: (W * W).sum(-1), "squared norm instead of norm"),
        (lambda W: torch.linalg.matrix_norm(W), "m per layer instead of per output feature"),
        (lambda W: torch.linalg.vector_norm(W, ord=1, dim=1), "sum of absolute values"),
        (rows, None),
    ],
    "02.2": [
        (lambda W: (W.norm(dim=0), W / W.norm(dim=0, keepdim=True)), "norm over the wrong axis"),
        (lambda W: (rows_(W), W.clone()), "direction not normalised"),
        (lambda W: (rows_(W), W / rows(W) ** 2), "divided by the squared norm"),
        (lambda W: (rows_(W), W / rows_(W)), "broadcast along the wrong axis"),
        (lambda W: (W / rows(W), rows_(W)), None),
        (rows_, None),
    ],
    "02.3": [
        (lambda W, V: torch.cosine_similarity(W, V, dim=1).mean(), "cosine instead of 1 - cosine"),
        (lambda W, V: 1 - torch.cosine_similarity(W, V, dim=0).mean(), "norm over the wrong axis"),
        (lambda W, V: torch.cosine_similarity(W, V).arccos().mean(), "angle instead of 1 - cosine"),
        (lambda W, V: len(W) - torch.cosine_similarity(W, V).sum(), "sum instead of mean"),
        (lambda W, V: 1 - (W * V).sum() / W.norm() / V.norm(), "one direction for the whole layer"),
        (lambda W, V: 1 - torch.cosine_similarity(W, V).median(), None),
    ],
    "02.4": [
        (lambda G, V, m: m[:, None] / rows(V) * G, "norm held constant"),
        (lambda G, V, m: gradient_eq6(G, V, torch.ones_like(m)), "m left out"),
        (lambda G, V, m: gradient_eq6(G, V, m) / rows(V), "squared norm instead of norm"),
        (lambda G, V, m: m[:, None] / rows(V) * (G - (G * V).sum(1, True) * V), "projection not normalised"),
        (lambda G, V, m: gradient_eq6(G.T, V.T, m).T, None),
    ],
    "03.1": [
        (lambda W, r: (torch.ones(len(W)), *start(W, r)[1:]), "m not initialised from W0"),
        (lambda W, r: (W.norm(dim=1), torch.randn(r, len(W)), torch.randn(len(W), r)), "B not zero at start"),
        (lambda W, r: (W.norm(dim=1), torch.zeros(r, len(W)), torch.zeros(len(W), r)), "A and B both zero"),
        (lambda W, r: (W.norm(dim=0), *start(W, r)[1:]), "norm over the wrong axis"),
        (lambda W, r: (W.norm(), *start(W, r)[1:]), "m per layer instead of per output feature"),
        (lambda W, r: (W.norm(dim=1), torch.zeros(r, len(W)), torch.randn(len(W), r)), "A zero and B random"),
        (lambda W, r: (W.norm(dim=1), torch.randn(len(W), r), torch.zeros(r, len(W))), None),
        (lambda W, r: W.norm(dim=1), None),
    ],
    "03.2": [
        (
            lambda W, m, A, B, s: m[:, None] * (W + s * B @ A) / (W + s * B @ A).norm(dim=0),
            "norm over the wrong axis",
        ),
        (lambda W, m, A, B, s: m[:, None] * W / rows(W) + B @ A * s, "ΔW added after normalising"),
        (lambda W, m, A, B, s: m[:, None] * (W + s * B @ A) / rows(W), "norm of W0 only"),
        (lambda W, m, A, B, s: naive(W, m, A, B, 1), "s left out"),
        (lambda W, m, A, B, s: m[:, None] * (s * B @ A + W), "not normalised"),
        (lambda W, m, A, B, s: naive(W, m, A, B, s) / m[:, None], "m left out"),
        (lambda W, m, A, B, s: naive(W, m, A, B, s) / rows(W + s * B @ A), "squared norm instead of norm"),
        (lambda W, m, A, B, s: W + s * B @ A, None),
    ],
    "03.3": [
        (lambda x, *parts: x @ naive(*parts).T, "no detach"),
        (lambda x, W, m, A, B, s: forward(x, W, m, A.detach(), B.detach(), s), "too much detached"),
        (lambda x, W, m, A, B, s: forward(x, W, m.detach(), A, B, s), "m gets no gradient"),
        (lambda *args: forward(*args).detach(), "nothing is trained"),
        (
            lambda x, W, m, A, B, s: x @ (m[:, None] * W / rows(W) + s * B @ A).T,
            "ΔW added after normalising",
        ),
        (lambda x, W, m, A, B, s: m / W.norm(dim=1) * (x @ (W + s * B @ A).T), "norm of W0 only"),
        (lambda *args: forward(*args) + 1, None),
        (lambda *args: 3, None),
    ],
    "03.4": [
        (lambda y, low, g, b: (y + low) * g, "bias scaled with the gain"),
        (lambda y, low, g, b: low * g + y, "gain on the low-rank part only"),
        (lambda y, low, g, b: y + (g - 1) * (y - b) + low, "gain on the base only"),
        (lambda y, low, g, b: (y - b + low) * g, "bias lost"),
        (lambda y, low, g, b: b + (y + low) * g, "bias added twice"),
        (lambda y, low, g, b: y + (g - 1) * (y - b) + (g - 1) * low, None),
    ],
    "03.5": [
        (lambda W, m, A, B, alpha, r: naive(W, m, A, B, alpha), "alpha without / r"),
        (lambda W, m, A, B, alpha, r: naive(W, m, A, B, 1), "merge without s"),
        (lambda W, m, A, B, alpha, r: naive(W, m, A, B, r), "r counted as alpha"),
        (lambda W, m, A, B, alpha, r: W + B @ A * (alpha / r), "merged as LoRA"),
        (lambda W, m, A, B, alpha, r: naive(W, rows_(W), A, B, alpha / r), "old lengths kept"),
        (lambda W, m, A, B, alpha, r: naive(W, m, A, B, r / alpha), None),
    ],
    "04.1": [
        (lambda shapes, r: sum(r * (o + i) for o, i in shapes), "m not counted"),
        (lambda shapes, r: sum(r * (o + i) + i for o, i in shapes), "m along the wrong axis"),
        (lambda shapes, r: sum(r * (o + i) + 1 for o, i in shapes), "m per layer instead of per output feature"),
        (lambda shapes, r: sum(r * i + o for o, i in shapes), "only one factor"),
        (lambda shapes, r: sum(r * o + o for o, i in shapes), "only B counted"),
        (lambda shapes, r: dora_count(shapes, r) + 1, None),
    ],
    "04.2": [
        (lambda t, b: t / b * 100, "of the base model"),
        (lambda t, b: t / (t + b), "share instead of percent"),
        (lambda t, b: 100 - 100 * t / (t + b), "what is saved instead of what is trained"),
        (lambda t, b: 100 * t / (b - t), "adapters taken off"),
        (lambda t, b: t, None),
    ],
    "04.3": [
        (["lora_B", "lora_A"], "m forgotten"),
        ({"lora_A", "lora_B", "magnitude", "norm"}, "norm saved"),
        ({"lora_A", "lora_B", "magnitude", "weight"}, "base weight saved"),
        ({"magnitude"}, "only m saved"),
        ({"norm"}, None),
        ({"lora_A", "lora_C"}, None),
        ("magnitude", None),
    ],
    "05.2": [
        (lambda counts: 1 / (sum(counts) / len(counts)), "one over the mean number of options"),
        (lambda counts: np.mean(100 / np.array(counts)), "percent instead of a share"),
        (lambda counts: 1 / 2, "half for every task"),
        (lambda counts: 0, "zero without knowledge"),
        (lambda counts: np.sum(1 / np.array(counts)), "number of right answers instead of a share"),
        (lambda counts: 1 / min(counts) - 0.01, None),
    ],
    "05.3": [
        (lambda d, c: 1.96**2 * (c - d**2) / d**2, "points taken as shares"),
        (lambda d, c: (1.959964 * 100 / d) ** 2 * 2 * 0.25, "unpaired"),
        (lambda d, c: (c - (d / 100) ** 2) / (d / 100) ** 2, "one standard error"),
        (lambda d, c: 1.959964**2 * (c - (d / 100) ** 2) / (d / 100), "square forgotten"),
        (lambda d, c: 1.959964**2 * c / (d / 100) ** 2, "difference left in the variance"),
        (lambda d, c: 1000, None),
        (lambda d, c: [1], None),
    ],
    "05.1": [
        (lambda candidates: choose(candidates)[::-1], "sum and mean swapped"),
        (lambda candidates: (choose(candidates)[0],) * 2, "sum alone"),
        (lambda candidates: (choose(candidates)[1],) * 2, "mean alone"),
        (lambda candidates: choose([[-x for x in tokens] for tokens in candidates]), "smallest instead of largest"),
        (lambda candidates: choose([[math.exp(x) for x in tokens] for tokens in candidates]), "probabilities added"),
        (lambda candidates: 0, None),
    ],
    "06.1": [
        (lambda train, test: majority(test, test), "majority of the test split"),
        (lambda train, test: majority(train, train), "scored on the training split"),
        (lambda train, test: 1 / 3, "chance instead of majority"),
        (lambda train, test: majority(train, test) * len(test), "count instead of share"),
        (lambda train, test: 0.9, None),
    ],
    "06.2": [
        (lambda forms, labels: majority(labels, labels), "form ignored"),
        (lambda forms, labels: 1.0, "the best form alone"),
        (lambda forms, labels: best_by_form(forms, labels) * len(labels), "count instead of share"),
        (lambda forms, labels: (3 / 5 + 2 / 3 + 1) / 3, "mean over forms without their weights"),
        (lambda forms, labels: 1 / 2, "chance"),
        (lambda forms, labels: 0.1, None),
    ],
    "09.1": [
        (lambda d, m: np.cov(d, m)[0, 1] / d.var(ddof=1), "slope instead of correlation"),
        (lambda d, m: np.cov(d, m, ddof=0)[0, 1], "covariance instead of correlation"),
        (lambda d, m: np.cov(d, m)[1, 0], "covariance instead of correlation"),
        (lambda d, m: np.corrcoef(d, m)[0, 1] ** 2, "squared correlation"),
        (lambda d, m: (d * m).sum() / np.sqrt((d * d).sum() * (m * m).sum()), "not centred"),
        (lambda d, m: -np.corrcoef(d, m)[0, 1], "size without sign"),
        (lambda d, m: np.corrcoef(d, m), None),
    ],
    "09.2": [
        (lambda r, low, high: "against" if r < 0 else "together", "interval ignored"),
        (
            lambda r, low, high: {"together": "against", "against": "together"}.get(reading(r, low, high), "undecided"),
            "sign turned round",
        ),
        (lambda r, low, high: "undecided" if abs(r) < 0.5 else reading(r, r, r), "size taken for certainty"),
        (lambda r, low, high: "undecided", "never decided"),
        (lambda r, low, high: "together", None),
    ],
    "13.1": [
        (lambda values: np.log(effective(values)), "entropy without the exponential"),
        (lambda values: effective(values * values), "shares of the energy"),
        (lambda values: np.square(values / values.max()).sum(), "stable rank"),
        (lambda values: effective(values) ** (1 / np.log(2)), "base of the logarithm"),
        (lambda values: np.prod(values**-values), "values not shares"),
        (len, "counted"),
        (lambda values: values[0], None),
    ],
    "13.2": [
        (lambda values, shapes: int(np.argmax(values)), "price ignored"),
        (lambda values, shapes: int(np.argmax(values / np.prod(shapes, axis=1))), "price of a full matrix"),
        (lambda values, shapes: int(np.argmax(values / np.array(shapes)[:, 1])), "price of one side"),
        (lambda values, shapes: min(range(len(values)), key=lambda i: sum(shapes[i])), "cheapest first"),
        (lambda values, shapes: 0, None),
    ],
    "14.1": [
        (lambda o, i, r, m: o * i * (m[-1] == "a") + o * (m[0] == "d"), "size of the product"),
        (lambda o, i, r, m: trained_by(i, o, r, m), "m over the inputs"),
        (lambda o, i, r, m: trained_by(o, i, r, "lora") * (m[-1] == "a") + (m[0] == "d"), "one m for a module"),
        (lambda o, i, r, m: trained_by(o, i, r, "lora" if m == "dora" else m), "m forgotten in DoRA"),
        (lambda o, i, r, m: trained_by(o, i, r, m) or o * i, "frozen counted"),
        (lambda o, i, r, m: trained_by(o, i, r, m) + 1, None),
        (640, None),
    ],
    "14.2": [
        (lambda c, g, b: spend(c, g, b, [0, 5, 4, 2, 1, 3]), "largest gain first"),
        (lambda c, g, b: spend(c, g, b, [3, 1, 2, 4, 0, 5]), "cheapest first"),
        (lambda c, g, b: [0, 4], "stopped at the first that does not fit"),
        (lambda c, g, b: spend(c, g, b, full=True), "budget passed"),
        (lambda c, g, b: [], None),
    ],
}  # fmt: skip


def test_every_exercise_has_a_solution_and_at_least_four_wrong_ones():
    assert RIGHT.keys() == WRONG.keys() == EXERCISES.keys()
    for name, exercise in EXERCISES.items():
        assert RIGHT[name] and len(WRONG[name]) >= 4, name
        assert len(exercise.hints) >= 2 and len(exercise.misconceptions) >= 4, name
        assert sum(diagnosis is not None for _, diagnosis in WRONG[name]) >= 4, name


@pytest.mark.parametrize("name, answer", [(name, answer) for name in RIGHT for answer in RIGHT[name]])
def test_right_answers_pass(name, answer):
    verdict = check(name, answer)
    assert (verdict.status, verdict.diagnosis) == ("right", None), verdict


@pytest.mark.parametrize("name, answer, diagnosis", [(name, *wrong) for name in WRONG for wrong in WRONG[name]])
def test_wrong_answers_are_wrong_and_known_mistakes_are_named(name, answer, diagnosis):
    verdict = check(name, answer)
    assert (verdict.status, verdict.diagnosis) == ("wrong", diagnosis), verdict
    assert verdict.message


@pytest.mark.parametrize("name", EXERCISES)
def test_declared_misconceptions_are_wrong_and_told_apart(name):
    for misconception in EXERCISES[name].misconceptions:
        verdict = check(name, misconception.wrong)
        assert (verdict.status, verdict.diagnosis) == ("wrong", misconception.name)
        assert verdict.message == misconception.message and misconception.name in repr(verdict)


def stub(*_):
    raise NotImplementedError


def takes_functions(name):
    return callable(RIGHT[name][0])


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize(
    "answer",
    [..., None, stub, lambda *_: None, lambda *_: ...],
    ids=["ellipsis", "none", "not-implemented", "gives-none", "gives-ellipsis"],
)
def test_nothing_done_is_not_tried(name, answer):
    if callable(answer) and not takes_functions(name):
        return
    verdict = check(name, answer)
    assert verdict.status == "not tried" and EXERCISES[name].question in verdict.message
    assert f"Exercise {name}: not tried" in repr(verdict)


@pytest.mark.parametrize("name", [name for name in RIGHT if takes_functions(name)])
def test_an_error_in_the_answer_is_named_and_not_raised(name):
    def broken(*_):
        return {}["missing"]

    verdict = check(name, broken)
    assert verdict.status == "error" and "KeyError: 'missing'" in verdict.message
    assert check(name, lambda: 1).status == "error"  # takes no arguments


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize(
    "answer", [object(), "x", -7, [], {}, torch.nan, lambda *_: object(), lambda *_: "x", lambda *_: torch.ones(0)]
)
def test_nonsense_is_wrong_and_never_raises(name, answer):
    assert check(name, answer).status == "wrong"


def test_an_answer_may_not_change_the_inputs_of_the_next_check():
    def spoils(W):
        W.mul_(0)
        return W.norm(dim=1)

    assert check("02.1", spoils).status == "wrong"
    assert check("02.1", RIGHT["02.1"][0]).status == "right"


def test_hints_come_one_after_the_other_and_the_last_stays():
    hints_shown.clear()
    hints = EXERCISES["03.2"].hints
    for place in (*range(len(hints)), len(hints) - 1):
        shown = hint("03.2")
        assert hints[place] in shown and f"Hint {place + 1} of {len(hints)}" in repr(shown)
    assert hints_shown == {"03.2": len(hints)}


@pytest.mark.parametrize("call", [lambda: check("99.1", 1), lambda: hint("99.1")])
def test_an_unknown_exercise_lists_the_known_ones(call):
    with pytest.raises(ValueError, match="unknown exercise '99.1': choose one of 01.1, 01.2, .*09.2"):
        call()
