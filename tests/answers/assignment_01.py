"""Assignment 01: LoRA from scratch."""


def _start(A, B):
    return f"import torch\n\n\ndef lora_start(W0, rank):\n    return {A}, {B}\n"


_random, _zero = "torch.randn(rank, W0.shape[1])", "torch.zeros(len(W0), rank)"


def _forward(body):
    return f"def lora_forward(x, W0, A, B, alpha):\n    {body}\n"


_best = "def best_factors(delta, rank):\n    u, s, vh = torch.linalg.svd(delta, full_matrices=False)\n    {body}\n"


def _svd(body):
    return _best.format(body=body)


RIGHT = {
    "a01-start": {
        "randn and zeros": _start(_random, _zero),
        "Kaiming as in PEFT": (
            "from torch import nn\n\n\ndef lora_start(W0, rank):\n    A = nn.init.kaiming_uniform_(torch.empty(rank, "
            "W0.shape[1]), a=5**0.5)\n    return A, torch.zeros(W0.shape[0], rank)\n"
        ),
        "parameters": _start(f"torch.nn.Parameter({_random})", f"torch.nn.Parameter({_zero})"),
        "new_* of the weight, a list": (
            "def lora_start(W0, rank):\n    out, inside = W0.shape\n"
            "    return [W0.new_empty(rank, inside).normal_(0, 1 / rank), W0.new_zeros(out, rank)]\n"
        ),
        "a uniform draw, B made of A": (
            "def lora_start(W0, rank):\n    A = torch.rand(rank, W0.size(1)) - 0.5\n"
            "    return A, (W0[:, :1] * 0).expand(-1, rank)\n"
        ),
    },
    "a01-forward": {
        "weight first": _forward("return x @ (W0 + alpha / len(A) * B @ A).T"),
        "two paths": _forward("return x @ W0.T + alpha / A.shape[0] * (x @ A.T) @ B.T"),
        "F.linear": (
            "import torch.nn.functional as F\n\n\n"
            "def lora_forward(x, W0, A, B, alpha):\n"
            "    return F.linear(x, W0) + F.linear(F.linear(x, A), B) * (alpha / B.shape[1])\n"
        ),
        "einsum": _forward(
            "return torch.einsum('...i,oi->...o', x, W0) + alpha / B.size(-1) * "
            "torch.einsum('...i,ri,or->...o', x, A, B)"
        ),
        "a module inside": (
            "class L(torch.nn.Module):\n    def __init__(self, W0, A, B, s):\n        super().__init__()\n"
            "        self.W0, self.A, self.B, self.s = W0, A, B, s\n\n    def forward(self, x):\n"
            "        return x @ self.W0.mT + self.s * x @ self.A.mT @ self.B.mT\n\n\n"
            "def lora_forward(x, W0, A, B, alpha):\n    return L(W0, A, B, alpha / A.shape[0])(x)\n"
        ),
    },
    "a01-best": {
        "values in B": _svd("return vh[:rank], u[:, :rank] * s[:rank]"),
        "values in A": _svd("return s[:rank, None] * vh[:rank], u[:, :rank]"),
        "square roots in both": _svd("root = s[:rank].sqrt().diag()\n    return root @ vh[:rank], u[:, :rank] @ root"),
        "projection on the rows": (
            "def best_factors(delta, rank):\n    values, vectors = torch.linalg.eigh(delta.T @ delta)\n"
            "    A = vectors[:, -rank:].T\n    return A, delta @ A.T\n"
        ),
        "numpy": (
            "import numpy as np\n\n\ndef best_factors(delta, rank):\n    u, s, vh = np.linalg.svd(delta.numpy())\n"
            "    return torch.from_numpy(vh[:rank]), torch.from_numpy(u[:, :rank] * s[:rank])\n"
        ),
    },
}
WRONG = {
    "a01-start": {
        "B random": _start(_random, "torch.randn(len(W0), rank)"),
        "A zero, B random": _start("torch.zeros(rank, W0.shape[1])", "torch.randn(len(W0), rank)"),
        "both zero": _start("torch.zeros(rank, W0.shape[1])", _zero),
        "shapes exchanged": _start("torch.randn(W0.shape[1], rank)", "torch.zeros(rank, len(W0))"),
        "A all ones": _start("torch.ones(rank, W0.shape[1])", _zero),
        "rows of A alike": _start("torch.randn(1, W0.shape[1]).expand(rank, -1)", _zero),
        "each row of A constant": _start("torch.randn(rank, 1).expand(-1, W0.shape[1])", _zero),
        "one column of A only": _start("torch.randn(rank, 1) * (torch.arange(W0.shape[1]) == 0)", _zero),
        "B of whole numbers": _start(_random, "torch.zeros(len(W0), rank, dtype=torch.long)"),
        "A seeded": _start(f"(torch.manual_seed(0), {_random})[1]", _zero),
        "A the rows of W0": _start("W0[:rank].clone()", _zero),
        "order exchanged": _start(_zero, _random),
        "B nearly zero": _start(_random, "torch.full((len(W0), rank), 1e-6)"),
        "one row of A only": _start("torch.randn(1, W0.shape[1]) * (torch.arange(rank) == 0)[:, None]", _zero),
        "in place of W0": _start(_random, "W0.zero_()[:, :rank]"),
        "the public example": _start("torch.randn(2, 7)", "torch.zeros(5, 2)"),
        "A not a number": _start(_random + " * float('nan')", _zero),
    },
    "a01-forward": {
        "s left out": _forward("return x @ (W0 + B @ A).T"),
        "alpha without the rank": _forward("return x @ (W0 + alpha * B @ A).T"),
        "divided by the root of the rank": _forward("return x @ (W0 + alpha / len(A) ** 0.5 * B @ A).T"),
        "rank from the inputs": _forward("return x @ (W0 + alpha / A.shape[1] * B @ A).T"),
        "the base alone": _forward("return x @ W0.T"),
        "the update alone": _forward("return alpha / len(A) * x @ A.T @ B.T"),
        "the identity, as in the example": _forward("return x"),
        "A detached": _forward("return x @ (W0 + alpha / len(A) * B @ A.detach()).T"),
        "B detached": _forward("return x @ (W0 + alpha / len(A) * B.detach() @ A).T"),
        "no gradients": _forward("with torch.no_grad():\n        return x @ (W0 + alpha / len(A) * B @ A).T"),
        "x detached": _forward("return x.detach() @ (W0 + alpha / len(A) * B @ A).T"),
        "update mirrored": _forward("return x @ W0.T + alpha / len(A) * (x @ A.T @ B.T).flip(-1)"),
        "merged into W0": _forward("W0 += (alpha / len(A) * B @ A).detach()\n    return x @ W0.T"),
        "rounded": _forward("return (x @ (W0 + alpha / len(A) * B @ A).T).float().double()"),
    },
    "a01-best": {
        "the first columns": "def best_factors(delta, rank):\n    return torch.linalg.pinv(delta[:, :rank]) @ delta, "
        "delta[:, :rank]\n",
        "the last values": _svd("return vh[-rank:], u[:, -rank:] * s[-rank:]"),
        "values left out": _svd("return vh[:rank], u[:, :rank]"),
        "values twice": _svd("return s[:rank, None] * vh[:rank], u[:, :rank] * s[:rank]"),
        "v not transposed": _svd("return vh[:, :rank].T, u[:, :rank] * s[:rank]"),
        "rank one less": _svd("s = s.clone()\n    s[rank - 1] = 0\n    return vh[:rank], u[:, :rank] * s[:rank]"),
        "a random projection": "def best_factors(delta, rank):\n    A = torch.linalg.qr(torch.randn(delta.shape[1], "
        "rank, dtype=delta.dtype))[0].T\n    return A, delta @ A.T\n",
        "full rank": "def best_factors(delta, rank):\n    return torch.eye(delta.shape[1], dtype=delta.dtype), delta\n",
        "order exchanged": _svd("return u[:, :rank] * s[:rank], vh[:rank]"),
        "one iteration": "def best_factors(delta, rank):\n    A = torch.linalg.qr(delta[:rank].T)[0].T\n"
        "    return A, delta @ A.T\n",
        "half precision": _svd("return vh[:rank].float(), (u[:, :rank] * s[:rank]).float()"),
        "the public example": "def best_factors(delta, rank):\n    return torch.arange(2.0, 5.0).double()[None], "
        "torch.arange(1.0, 6.0).double()[:, None]\n",
        "delta used up": _svd("delta.zero_()\n    return vh[:rank], u[:, :rank] * s[:rank]"),
    },
}
