"""Assignment 02: magnitude and direction."""


def _decompose(body):
    return f"import torch\n\n\ndef decompose(W):\n    {body}\n"


def _movement(body):
    return f"def movement(W, W0):\n    {body}\n"


def _pull(body):
    return f"def pull_back(G, V, m):\n    {body}\n"


_cos = "torch.cosine_similarity(W, W0, dim=1)"
_dm = "(W.norm(dim=1) - W0.norm(dim=1)).abs().mean()"
_unit = "n = V.norm(dim=1, keepdim=True)\n    u = V / n\n    a = (G * u).sum(1, keepdim=True)\n    "

_leaves = (
    "a, b = (t.clone().requires_grad_() for t in (V, m))\n    w = b[:, None] * a / a.norm(dim=1, keepdim=True)\n    "
)

RIGHT = {
    "a02-decompose": {
        "where": _decompose("m = W.norm(dim=1)\n    return m, W / torch.where(m == 0, 1.0, m)[:, None]"),
        "nan_to_num": _decompose("m = W.norm(dim=1)\n    return m, torch.nan_to_num(W / m[:, None])"),
        "a loop over rows": _decompose(
            "m, V = [], []\n    for row in W:\n        m.append((row @ row) ** 0.5)\n"
            "        V.append(row / m[-1] if m[-1] > 0 else row)\n    return torch.stack(m), torch.stack(V)"
        ),
        "normalize": _decompose(
            "return torch.linalg.norm(W, axis=1), torch.nn.functional.normalize(W, dim=1, eps=1e-300)"
        ),
        "normalize as it comes": _decompose(
            "return torch.linalg.norm(W, axis=1), torch.nn.functional.normalize(W, dim=1)"
        ),
        "masked assignment": _decompose(
            "m = torch.einsum('oi,oi->o', W, W).sqrt()\n    V = torch.zeros_like(W)\n"
            "    V[m > 0] = W[m > 0] / m[m > 0].unsqueeze(1)\n    return m, V"
        ),
    },
    "a02-movement": {
        "cosine_similarity": _movement(f"return {_dm}, (1 - {_cos}).mean()"),
        "floats": _movement(f"return ({_dm}).item(), 1 - ({_cos}).mean().item()"),
        "unit rows": _movement(
            "m, m0 = W.norm(dim=1), W0.norm(dim=1)\n    c = ((W / m[:, None]) * (W0 / m0[:, None])).sum(dim=1)\n"
            "    return [torch.mean(abs(m - m0)), torch.mean(1 - c)]"
        ),
        "half the squared chord": _movement(
            "u, v = (torch.nn.functional.normalize(w, dim=1) for w in (W, W0))\n"
            f"    return {_dm}, (u - v).square().sum(dim=1).mean() / 2"
        ),
        "a loop in numpy": (
            "import numpy as np\n\n\ndef movement(W, W0):\n    a, b = W.numpy(), W0.numpy()\n"
            "    l = [(np.linalg.norm(x), np.linalg.norm(y), x @ y) for x, y in zip(a, b)]\n"
            "    return np.mean([abs(p - q) for p, q, _ in l]), np.mean([1 - d / (p * q) for p, q, d in l])\n"
        ),
    },
    "a02-gradients": {
        "by the formula": _pull(_unit + "return a[:, 0], m[:, None] / n * (G - a * u)"),
        "einsum": _pull(
            "n = torch.einsum('oi,oi->o', V, V).sqrt()\n    d = torch.einsum('oi,oi->o', G, V)\n"
            "    return d / n, (m / n)[:, None] * G - (m * d / n**3)[:, None] * V"
        ),
        "a projector for each row": _pull(
            "gm, gv = [], []\n    for g, v, k in zip(G, V, m):\n        n = v.norm()\n"
            "        P = torch.eye(len(v), dtype=v.dtype) - torch.outer(v, v) / n**2\n"
            "        gm.append(g @ v / n)\n        gv.append(k / n * P @ g)\n"
            "    return torch.stack(gm), torch.stack(gv)"
        ),
        "batched": _pull(
            "u = torch.nn.functional.normalize(V, dim=1)\n    P = torch.eye(V.shape[1], dtype=V.dtype) - "
            "u[:, :, None] * u[:, None, :]\n    return (G * u).sum(-1), "
            "torch.bmm(P, G[:, :, None])[:, :, 0] * (m / V.norm(dim=1))[:, None]"
        ),
        "transposed": _pull(
            "U = (V.T / V.norm(dim=1)).T\n    a = torch.diag(G @ U.T)\n"
            "    return a, ((G - torch.diag(a) @ U).T * m / V.norm(dim=1)).T"
        ),
    },
}
WRONG = {
    "a02-decompose": {
        "the other axis": _decompose("m = W.norm(dim=0)\n    return m, W / m"),
        "lengths right, directions by column": _decompose("return W.norm(dim=1), W / W.norm(dim=0)"),
        "zeros divided": _decompose("m = W.norm(dim=1)\n    return m, W / m[:, None]"),
        "squared": _decompose("m = W.square().sum(dim=1)\n    return m, W / m[:, None].clamp(min=1e-300)"),
        "one length for the layer": _decompose("m = W.norm().expand(len(W))\n    return m, W / m[:, None]"),
        "the weight as direction": _decompose("return torch.ones(len(W), dtype=W.dtype), W"),
        "sum of absolute values": _decompose("m = W.abs().sum(1)\n    return m, W / m[:, None].clamp(min=1e-300)"),
        "largest entry": _decompose("m = W.abs().amax(1)\n    return m, W / m[:, None].clamp(min=1e-300)"),
        "an epsilon in the length": _decompose("m = W.norm(dim=1) + 1e-6\n    return m, W / m[:, None]"),
        "a tiny epsilon": _decompose("m = W.norm(dim=1)\n    return m, W / (m[:, None] + 1e-12)"),
        "clamped too high": _decompose("m = W.norm(dim=1)\n    return m, W / m[:, None].clamp(min=1e-8)"),
        "order exchanged": _decompose("m = W.norm(dim=1)\n    return W / m[:, None].clamp(min=1e-300), m"),
        "in place": _decompose("m = W.norm(dim=1)\n    W /= m[:, None].clamp(min=1e-300)\n    return m, W"),
        "negative lengths": _decompose("m = -W.norm(dim=1)\n    return m, W / m[:, None].clamp(max=-1e-300)"),
        "directions rounded": _decompose(
            "m = W.norm(dim=1)\n    return m, (W / m[:, None].clamp(min=1e-300)).float().double()"
        ),
    },
    "a02-movement": {
        "the other axis": _movement(
            "return (W.norm(dim=0) - W0.norm(dim=0)).abs().mean(), (1 - torch.cosine_similarity(W, W0, dim=0)).mean()"
        ),
        "sum and no mean": _movement(f"return ({_dm}) * len(W), (1 - {_cos}).sum()"),
        "no absolute value": _movement(f"return (W.norm(dim=1) - W0.norm(dim=1)).mean(), (1 - {_cos}).mean()"),
        "absolute value of the mean": _movement(
            f"return (W.norm(dim=1) - W0.norm(dim=1)).mean().abs(), (1 - {_cos}).mean()"
        ),
        "length of the difference": _movement(f"return (W - W0).norm(dim=1).mean(), (1 - {_cos}).mean()"),
        "cosine without one minus": _movement(f"return {_dm}, ({_cos}).mean()"),
        "angle": _movement(f"return {_dm}, torch.arccos(({_cos}).clamp(-1, 1)).mean()"),
        "squared cosine": _movement(f"return {_dm}, (1 - ({_cos}) ** 2).mean()"),
        "the whole matrix as one vector": _movement(
            "return (W.norm() - W0.norm()).abs(), 1 - torch.cosine_similarity(W.flatten(), W0.flatten(), dim=0)"
        ),
        "order exchanged": _movement(f"return (1 - {_cos}).mean(), {_dm}"),
        "squared change": _movement(f"return (W.norm(dim=1) - W0.norm(dim=1)).square().mean(), (1 - {_cos}).mean()"),
        "relative change": _movement(
            f"return ((W.norm(dim=1) - W0.norm(dim=1)).abs() / W0.norm(dim=1)).mean(), (1 - {_cos}).mean()"
        ),
        "the public example": _movement("return 1.0, 0.0"),
        "root mean square": _movement(
            f"return (W.norm(dim=1) - W0.norm(dim=1)).square().mean().sqrt(), (1 - {_cos}).mean()"
        ),
        "each row its own": _movement(f"return (W.norm(dim=1) - W0.norm(dim=1)).abs(), 1 - {_cos}"),
    },
    "a02-gradients": {
        "autograd": _pull(_leaves + "return torch.autograd.grad((w * G).sum(), [b, a])"),
        "autograd by backward": _pull(_leaves + "(w * G).sum().backward()\n    return b.grad, a.grad"),
        "autograd with gradients enabled": _pull(
            "with torch.enable_grad():\n        a, b = (t.clone().requires_grad_() for t in (V, m))\n"
            "        w = b[:, None] * a / a.norm(dim=1, keepdim=True)\n"
            "        return torch.autograd.grad((w * G).sum(), [b, a])"
        ),
        "forward-mode autograd": _pull(
            "f = lambda b, a: (b[:, None] * a / a.norm(dim=1, keepdim=True) * G).sum()\n"
            "    return torch.func.jacfwd(f, argnums=(0, 1))(m, V)"
        ),
        "autograd in a mode of its own": _pull(
            "with torch.inference_mode(False), torch.enable_grad():\n"
            "        G, V, m = (t.clone() for t in (G, V, m))\n"
            "        a, b = (t.clone().requires_grad_() for t in (V, m))\n"
            "        w = b[:, None] * a / a.norm(dim=1, keepdim=True)\n"
            "        return torch.autograd.grad((w * G).sum(), [b, a])"
        ),
        "torch.func": _pull(
            "f = lambda b, a: (b[:, None] * a / a.norm(dim=1, keepdim=True) * G).sum()\n"
            "    return torch.func.grad(f, argnums=(0, 1))(m, V)"
        ),
        "norm held constant": _pull(_unit + "return a[:, 0], m[:, None] / n * G"),
        "not divided by the length": _pull(_unit + "return a[:, 0], m[:, None] * (G - a * u)"),
        "m left out": _pull(_unit + "return a[:, 0], (G - a * u) / n"),
        "V taken for a unit vector": _pull(
            "a = (G * V).sum(1, keepdim=True)\n    return a[:, 0], m[:, None] * (G - a * V)"
        ),
        "the other axis": _pull(
            "n = V.norm(dim=0)\n    u = V / n\n    a = (G * u).sum(0)\n"
            "    return (G * u).sum(1), m[:, None] / n * (G - a * u)"
        ),
        "gradient of m along V": _pull(_unit + "return (G * V).sum(1), m[:, None] / n * (G - a * u)"),
        "sign of the projection": _pull(_unit + "return a[:, 0], m[:, None] / n * (G + a * u)"),
        "only the part along V": _pull(_unit + "return a[:, 0], m[:, None] / n * a * u"),
        "length squared": _pull(_unit + "return a[:, 0], m[:, None] / n**2 * (G - a * u)"),
        "m's gradient scaled by m": _pull(_unit + "return m * a[:, 0], m[:, None] / n * (G - a * u)"),
        "order exchanged": _pull(_unit + "return m[:, None] / n * (G - a * u), a[:, 0]"),
        "m along the columns": _pull(_unit + "return a[:, 0], (m.mean() / n) * (G - a * u)"),
        "the public example": _pull("return 3 * torch.ones_like(m), 0 * G"),
        "absolute m": _pull(_unit + "return a[:, 0], m.abs()[:, None] / n * (G - a * u)"),
        "V normalised in place": _pull(
            "n = V.norm(dim=1, keepdim=True).clone()\n    V /= n\n    a = (G * V).sum(1, keepdim=True)\n"
            "    return a[:, 0], m[:, None] / n * (G - a * V)"
        ),
    },
}
