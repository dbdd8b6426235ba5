"""Assignment 03: DoRA from scratch, with a merge."""


def _start(m, A, B):
    return f"import torch\n\n\ndef dora_start(W0, rank):\n    return {m}, {A}, {B}\n"


def _forward(body):
    return f"def dora_forward(x, W0, bias, m, A, B, s):\n    V = W0 + s * B @ A\n    {body}\n"


def _merge(body):
    return f"def dora_merge(W0, bias, m, A, B, s):\n    V = W0 + s * B @ A\n    {body}\n"


_m, _A, _B = "W0.norm(dim=1)", "torch.randn(rank, W0.shape[1])", "torch.zeros(len(W0), rank)"
_n = "n = V.detach().norm(dim=1)\n    "

RIGHT = {
    "a03-start": {
        "norm, randn, zeros": _start(_m, _A, _B),
        "Kaiming as in PEFT": _start(
            "torch.linalg.norm(W0, dim=1)",
            "torch.nn.init.kaiming_uniform_(torch.empty(rank, W0.size(1)), a=5**0.5)",
            _B,
        ),
        "parameters": _start(*(f"torch.nn.Parameter({part})" for part in (_m, _A, _B))),
        "einsum and new_*": _start(
            "torch.einsum('oi,oi->o', W0, W0).sqrt()",
            "W0.new_empty(rank, W0.shape[1]).uniform_(-1, 1)",
            "W0.new_zeros(W0.shape[0], rank)",
        ),
        "a list, row by row": (
            "def dora_start(W0, rank):\n    m = torch.tensor([float((r * r).sum()) ** 0.5 for r in W0]"
            ", dtype=W0.dtype)\n"
            "    return [m, torch.rand(rank, len(W0[0])) * 2 - 1, torch.zeros(len(W0), rank)]\n"
        ),
    },
    "a03-forward": {
        "weight form": _forward("return x @ (m / V.detach().norm(dim=1))[:, None].mul(V).T + bias"),
        "output form": _forward(_n + "return m / n * (x @ W0.T + s * (x @ A.T) @ B.T) + bias"),
        "correction of the base": _forward(
            _n + "base = x @ W0.T\n    g = m / n\n    return base + bias + (g - 1) * base + g * s * (x @ A.T @ B.T)"
        ),
        "no_grad and F.linear": _forward(
            "with torch.no_grad():\n        n = torch.linalg.vector_norm(V, dim=1)\n"
            "    return torch.nn.functional.linear(x, (m / n).unsqueeze(1) * V, bias)"
        ),
        "the norm multiplied out": _forward(
            "a, b = A.detach(), B.detach()\n"
            "    n = ((W0**2).sum(1) + 2 * s * (b * (W0 @ a.T)).sum(1) + s**2 * ((b @ (a @ a.T)) * b).sum(1)).sqrt()\n"
            "    return torch.einsum('...i,oi,o->...o', x, V, m / n) + bias"
        ),
        "one output at a time": _forward(
            "return torch.stack([x @ V[o] * (m[o] / V[o].detach().norm()) + bias[o] for o in range(len(m))], dim=-1)"
        ),
    },
    "a03-merge": {
        "broadcast": _merge("return m[:, None] * V / V.norm(dim=1, keepdim=True), bias"),
        "a diagonal matrix": _merge("return torch.diag(m / V.norm(dim=1)) @ V, bias.clone()"),
        "normalize": _merge("return torch.nn.functional.normalize(V, dim=1) * m.unsqueeze(1), bias"),
        "read off the outputs": _merge(
            "eye = torch.eye(W0.shape[1], dtype=W0.dtype)\n    y = m / V.norm(dim=1) * (eye @ V.T)\n"
            "    return y.T, bias"
        ),
        "row by row, a list": _merge("return [torch.stack([k * v / v.norm() for k, v in zip(m, V)]), bias]"),
    },
}
WRONG = {
    "a03-start": {
        "m all ones": _start("torch.ones(len(W0))", _A, _B),
        "the other axis": _start("W0.norm(dim=0)", _A, _B),
        "squared": _start("W0.square().sum(dim=1)", _A, _B),
        "one m for the layer": _start("W0.norm().expand(len(W0))", _A, _B),
        "m with a second axis": _start("W0.norm(dim=1, keepdim=True)", _A, _B),
        "B random": _start(_m, _A, "torch.randn(len(W0), rank)"),
        "both zero": _start(_m, "torch.zeros(rank, W0.shape[1])", _B),
        "A zero, B random": _start(_m, "torch.zeros(rank, W0.shape[1])", "torch.randn(len(W0), rank)"),
        "shapes exchanged": _start(_m, "torch.randn(W0.shape[1], rank)", "torch.zeros(rank, len(W0))"),
        "A all ones": _start(_m, "torch.ones(rank, W0.shape[1])", _B),
        "rows of A alike": _start(_m, "torch.randn(1, W0.shape[1]).expand(rank, -1)", _B),
        "each row of A constant": _start(_m, "torch.randn(rank, 1).expand(-1, W0.shape[1])", _B),
        "one column of A only": _start(_m, "torch.randn(rank, 1) * (torch.arange(W0.shape[1]) == 0)", _B),
        "B of whole numbers": _start(_m, _A, "torch.zeros(len(W0), rank, dtype=torch.long)"),
        "A seeded": _start(_m, f"(torch.manual_seed(0), {_A})[1]", _B),
        "m of the update": _start("torch.zeros(len(W0))", _A, _B),
        "W0 scaled in place": _start("W0.mul_(2).norm(dim=1)", _A, _B),
        "order exchanged": _start(_A, _B, _m),
    },
    "a03-forward": {
        "absolute m": _forward(_n + "return m.abs() / n * (x @ V.T) + bias"),
        "no detach": _forward("return m / V.norm(dim=1) * (x @ V.T) + bias"),
        "V detached": _forward("return m / V.detach().norm(dim=1) * (x @ V.detach().T) + bias"),
        "gain detached": _forward("return (m / V.norm(dim=1)).detach() * (x @ V.T) + bias"),
        "the other axis": _forward("return x @ (m[:, None] * V / V.detach().norm(dim=0)).T + bias"),
        "norm of W0": _forward("return m / W0.norm(dim=1) * (x @ V.T) + bias"),
        "update after normalising": _forward(
            "return x @ (m[:, None] * W0 / W0.norm(dim=1, keepdim=True) + s * B @ A).T + bias"
        ),
        "bias scaled": _forward(_n + "return m / n * (x @ V.T + bias)"),
        "bias left out": _forward(_n + "return m / n * (x @ V.T)"),
        "gain left out of the base": _forward(_n + "return x @ W0.T + m / n * s * (x @ A.T @ B.T) + bias"),
        "gain left out of the update": _forward(_n + "return m / n * (x @ W0.T) + s * (x @ A.T @ B.T) + bias"),
        "s left out": "def dora_forward(x, W0, bias, m, A, B, s):\n    V = W0 + B @ A\n"
        "    return m / V.detach().norm(dim=1) * (x @ V.T) + bias\n",
        "not normalised": _forward("return m * (x @ V.T) + bias"),
        "squared norm": _forward("return m / V.detach().square().sum(1) * (x @ V.T) + bias"),
        "one norm for the layer": _forward("return m / V.detach().norm() * (x @ V.T) + bias"),
        "LoRA": _forward("return x @ V.T + bias"),
        "s not in the norm": _forward("n = (W0 + B @ A).detach().norm(dim=1)\n    return m / n * (x @ V.T) + bias"),
        "no gradients": _forward("with torch.no_grad():\n        return m / V.norm(dim=1) * (x @ V.T) + bias"),
        "A's gradient dropped": _forward(_n + "V = W0 + s * B @ A.detach()\n    return m / n * (x @ V.T) + bias"),
        "the public example": _forward("return 2 * x + 1"),
        "computed once": _forward(
            "global _g\n    if '_g' not in globals():\n        _g = float((m / V.norm(dim=1))[0])\n"
            "    return _g * (x @ V.T) + bias"
        ),
    },
    "a03-merge": {
        "absolute m": _merge("return m.abs()[:, None] * V / V.norm(dim=1, keepdim=True), bias"),
        "LoRA's merge": _merge("return V, bias"),
        "m left out": _merge("return V / V.norm(dim=1, keepdim=True), bias"),
        "the other axis": _merge("return m[:, None] * V / V.norm(dim=0), bias"),
        "m along the columns": _merge("return V / V.norm(dim=1, keepdim=True) * m.mean(), bias"),
        "norm of W0": _merge("return m[:, None] * V / W0.norm(dim=1, keepdim=True), bias"),
        "update after normalising": _merge("return m[:, None] * W0 / W0.norm(dim=1, keepdim=True) + s * B @ A, bias"),
        "bias scaled": _merge("g = m / V.norm(dim=1)\n    return g[:, None] * V, g * bias"),
        "bias left out": _merge("return m[:, None] * V / V.norm(dim=1, keepdim=True), torch.zeros_like(bias)"),
        "no bias returned": _merge("return m[:, None] * V / V.norm(dim=1, keepdim=True)"),
        "transposed": _merge("return (m[:, None] * V / V.norm(dim=1, keepdim=True)).T, bias"),
        "the difference to W0": _merge("return m[:, None] * V / V.norm(dim=1, keepdim=True) - W0, bias"),
        "squared norm": _merge("return m[:, None] * V / V.square().sum(1, keepdim=True), bias"),
        "in place": _merge("W0.copy_(m[:, None] * V / V.norm(dim=1, keepdim=True))\n    return W0, bias"),
        "s twice": "def dora_merge(W0, bias, m, A, B, s):\n    V = W0 + s * s * B @ A\n"
        "    return m[:, None] * V / V.norm(dim=1, keepdim=True), bias\n",
        "the public example": _merge("return 3 * torch.eye(4, dtype=W0.dtype), bias"),
        "rounded": _merge("return (m[:, None] * V / V.norm(dim=1, keepdim=True)).float().double(), bias"),
    },
}
