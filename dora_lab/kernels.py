"""The fast DoRA product: the norm once per optimizer step, and a backward that saves what LoRA's saves and its output.

With the gain g = m / ‖W0 + s·B·A‖, one per output feature (Eq. 5, arXiv 2402.09353; the norm is a constant, Sec. 4.3):

    y = g·(x·W0ᵀ + s·x·Aᵀ·Bᵀ) + bias      ∂L/∂m = Σ_tokens (∂L/∂y · (y - bias)) / m

The second identity is why the output is all that the gradient of m needs: neither x·W0ᵀ nor the low-rank result is
kept. The norm comes from ‖W0‖², which a frozen base has once and for all, and two small products ("factored"):

    ‖W0 + s·B·A‖² = ‖W0‖² + 2s·rowsum(B ∘ (W0·Aᵀ)) + s²·rowsum((B·A·Aᵀ) ∘ B)

or from the rows of W0 + s·B·A themselves, some at a time ("dense"). Both are summed in float32 at least.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

CHUNK_ELEMENTS = 2**21  # of W0 widened to float32 at a time
CANCELLATION = 1e-2  # a row whose ‖·‖² is less than this share of the terms it is the sum of is taken densely
_optimizer_steps = 0


def _count_step(*_) -> None:
    """Some optimizers write through `.data`, which no version counter sees: every step ends the life of a norm."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def weight_of(base: nn.Module) -> Tensor:
    """The weight of a frozen layer as (out, in): a view of Linear's and Conv1D's, dequantised from 4 or 8 bits."""
    if type(base).__name__ == "Conv1D":  # GPT-2's layer keeps (in, out)
        return base.weight.detach().T
    weight, kind = base.weight.detach(), type(base.weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight, base.weight.quant_state)
    if kind == "Int8Params":  # one scale a row: the first forward moves it from the weight to the layer's state
        scale = base.weight.SCB if base.state.SCB is None else base.state.SCB  # (out,)
        return weight * (scale / 127)[:, None]
    return weight


def replace_weight(base: nn.Module, weight: Tensor) -> None:
    """Give a Linear or Conv1D a parameter of its own that holds `weight` (out, in); who shared the old one keeps it."""
    stored = weight.T.contiguous() if type(base).__name__ == "Conv1D" else weight
    base.weight = nn.Parameter(stored, requires_grad=base.weight.requires_grad)


def is_linear(module: nn.Module) -> bool:
    """Whether the layer can be adapted: nn.Linear (bitsandbytes' layers are some) or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def features_of(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; what it stores may have another shape."""
    return tuple(base.weight.shape[::-1]) if type(base).__name__ == "Conv1D" else (base.out_features, base.in_features)


def without_bias(base: nn.Module, x: Tensor) -> Tensor:
    """x·W0ᵀ, (..., in) -> (..., out)."""
    if type(base) is nn.Linear or type(base).__name__ == "Conv1D":
        return torch.nn.functional.linear(x, weight_of(base).to(x.dtype))
    return base(x) if base.bias is None else base(x) - base.bias


def is_fresh(base: nn.Module) -> bool:
    """Whether nobody but the caller holds what `base` returns, so that its memory may be used again."""
    return type(base) is nn.Linear and not base._forward_hooks and not base._backward_hooks


def norm_kind(out_features: int, in_features: int, rank: int) -> str:
    """ "factored" or "dense", whichever was the faster one on the CPU (chapter 10 has the measurement).

    The factored norm does not write W0 + s·B·A; the dense one has no rank x rank terms, which count once the rank nears
    an eighth of the layer's smaller side.
    """
    return "factored" if 8 * rank <= min(out_features, in_features) else "dense"


@torch.no_grad()
def squared_norm(weight: Tensor) -> Tensor:
    """‖W‖² of each row, (out, in) -> (out,), float32 or wider. Its root is `geometry.magnitude` to the last bit."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(rows.to(wide), dim=1) for rows in weight.split(_rows_at_a_time(weight))]
    return torch.cat(norms).square()  # (out,)


@torch.no_grad()
def adapted_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, base_squares: Tensor, kind: str | None = None
) -> Tensor:
    """‖W0 + s·B·A‖ of each row, (out,); 1 where it is 0, so that 0 / 1 = 0.

    weight (out, in) in any precision, lora_A (rank, in), lora_B (out, rank), base_squares = ‖W0‖² (out,).
    kind: "factored", "dense", or None for `norm_kind`'s choice.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    A, B = lora_A.to(wide), lora_B.to(wide)
    if (kind or norm_kind(*weight.shape, A.shape[0])) == "dense":
        norm = _dense_norm(weight, A, B, scaling)  # (out,)
    else:
        parts = weight.split(_rows_at_a_time(weight))
        crossed = torch.cat([rows.to(wide) @ A.T for rows in parts])  # (out, rank): W0·Aᵀ
        gram = A @ A.T  # (rank, rank)
        cross = 2 * scaling * torch.linalg.vecdot(B, crossed)  # (out,)
        own = scaling**2 * torch.linalg.vecdot(B @ gram, B)  # (out,)
        squares = base_squares.to(wide) + cross + own  # (out,)
        norm = squares.clamp_min(0).sqrt()
        largest = base_squares + scaling**2 * gram.abs().sum(1).max() * B.square().sum(1)  # (out,) of what was summed
        cancelled = squares < CANCELLATION * largest  # too many digits are gone
        if cancelled.any():
            norm[cancelled] = _dense_norm(weight[cancelled], A, B[cancelled], scaling)
    return torch.where(norm == 0, 1.0, norm)


def _dense_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    size = _rows_at_a_time(weight)
    parts = zip(weight.split(size), B.split(size), strict=True)
    return torch.cat([torch.linalg.vector_norm(rows.to(A.dtype) + scaling * (b @ A), dim=1) for rows, b in parts])


def _rows_at_a_time(weight: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[1])


class NormCache:
    """What one adapter remembers between forwards: ‖W0‖², the norm, and where m is exactly 0.

    A value is used again only while the tensors it was made from are the same memory with the same version counter and
    no optimizer has stepped: it survives micro-batches and checkpointed recomputation, and not an optimizer step, a
    load, an edit in place, a move or a merge. An edit through `.data` outside of an optimizer is seen by nobody: call
    `forget` after one. A copied or unpickled cache is empty.
    """

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Compute everything anew at the next forward."""
        self._kept: dict[str, tuple] = {}
        self.computed = 0  # norms computed so far, for tests and the benchmark

    def __reduce__(self):
        return NormCache, ()

    def base_squares(self, base: nn.Module) -> Tensor:
        """‖W0‖² (out,): computed once for a frozen base."""
        return self._fresh("base", (base.weight,), None, lambda: squared_norm(weight_of(base)))

    def norm(self, base: nn.Module, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
        """‖W0 + s·B·A‖ (out,), or ‖W0‖ without A and B; 1 where it is 0."""
        if lora_A is None:
            squares = self.base_squares(base)
            return torch.where(squares == 0, 1.0, squares.sqrt())
        if torch.compiler.is_compiling():  # a compiled graph may not depend on what a cache holds
            return adapted_norm(weight_of(base), lora_A, lora_B, scaling, base.weight.new_zeros(()), "dense")

        def compute():
            self.computed += 1
            return adapted_norm(weight_of(base), lora_A.detach(), lora_B.detach(), scaling, self.base_squares(base))

        return self._fresh("norm", (base.weight, lora_A, lora_B), (scaling, _optimizer_steps), compute)

    def zero_rows(self, magnitude: Tensor) -> Tensor | None:
        """Indices of the rows with m = 0, where the gradient of m cannot be read off the output; None if none is."""

        def find():
            zero = magnitude.detach() == 0
            return zero.nonzero()[:, 0] if zero.any() else None

        return self._fresh("zeros", (magnitude,), _optimizer_steps, find)

    def _fresh(self, name: str, tensors: tuple[Tensor, ...], extra: object, compute: Callable):
        aliases, kept_extra, value = self._kept.get(name, ((), None, None))
        if aliases and kept_extra == extra and all(map(_unchanged, tensors, aliases)):
            return value
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve in training too
            value = compute()
        if not any(t.is_inference() for t in tensors):  # those have no version counter
            # an alias keeps its memory from being given to another tensor, and shares the version counter
            self._kept[name] = (tuple((t.detach(), t._version) for t in tensors), extra, value)
        return value


def _unchanged(tensor: Tensor, kept: tuple[Tensor, int]) -> bool:
    alias, version = kept
    return (
        not tensor.is_inference()
        and tensor.data_ptr() == alias.data_ptr()
        and tensor._version == version
        and (tensor.dtype, tensor.shape, tensor.stride()) == (alias.dtype, alias.shape, alias.stride())
    )


def dora_product(
    base_output: Tensor,
    hidden: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    zero_rows: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """y = g·(base_output - bias + s·hidden·Bᵀ) + bias, g = m / norm, in base_output's dtype.

    base_output (..., out) is the frozen layer's, with its bias; hidden = x·Aᵀ (..., rank); lora_B (out, rank);
    magnitude, norm, bias (out,). With g = 1 and B = 0 it is base_output bit for bit. Gradients go to base_output,
    hidden, lora_B and magnitude; norm is a constant. Besides hidden only the output is saved.
    overwrite: base_output's memory may become the output's. zero_rows: indices where m is 0.
    """
    overwrite = overwrite and not base_output._is_view()  # autograd would copy a view's gradient
    return _DoraProduct.apply(base_output, hidden, lora_B, magnitude, norm, scaling, bias, zero_rows, overwrite)


def dora_correction(
    base: nn.Module, result: Tensor, dropped: Tensor, hidden: Tensor, lora_B: Tensor, gain: Tensor, scaling: float
) -> Tensor:
    """Faithful dropout: y = result + (g - 1)·x̃·W0ᵀ + g·s·hidden·Bᵀ, in result's dtype, by plain autograd.

    result = x·W0ᵀ + bias (..., out); dropped = x̃ (..., in); hidden = x̃·Aᵀ (..., rank); gain g (out,).
    """
    base_product = without_bias(base, dropped.to(result.dtype))  # (..., out)
    update = torch.nn.functional.linear(hidden, (scaling * gain)[:, None] * lora_B)  # (..., out)
    return (result + (gain - 1) * base_product + update).to(result.dtype)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])  # (..., features) -> (tokens, features)


class _DoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base_output, hidden, lora_B, magnitude, norm, scaling, bias, zero_rows, overwrite):
        with torch.autocast(base_output.device.type, enabled=False):
            gain = (magnitude / norm).to(magnitude.dtype)  # (out,)
            flat, tokens = _flat(base_output), _flat(hidden)  # (tokens, out), (tokens, rank)
            scaled_B = (scaling * gain[:, None] * lora_B).to(hidden.dtype)  # (out, rank)
            lost = None
            if zero_rows is not None:  # what the output will not tell: (tokens, rows with m = 0)
                lost = flat[:, zero_rows] + scaling * tokens @ lora_B[zero_rows].to(hidden.dtype).T
                lost = (lost if bias is None else lost - bias[zero_rows]) / norm[zero_rows]
            if hidden.dtype != base_output.dtype:  # float32 adapters on a bf16 base: summed in float32
                y = torch.addmm(flat * gain.to(hidden.dtype), tokens, scaled_B.T)  # (tokens, out)
            else:
                y = flat.mul_(gain) if overwrite else (flat * gain).to(flat.dtype)  # (tokens, out)
                y = y.addmm_(tokens, scaled_B.T)
            if bias is not None:
                y.add_((1 - gain) * bias)
            if overwrite and y.data_ptr() == base_output.data_ptr():
                ctx.mark_dirty(base_output)
                y = base_output
            else:
                y = y.to(base_output.dtype).view(base_output.shape)  # (..., out)
        ctx.scaling, ctx.has_lost = scaling, lost is not None
        ctx.save_for_backward(y, hidden, lora_B, magnitude, norm, bias, zero_rows, lost)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, hidden, lora_B, magnitude, norm, bias, zero_rows, lost = ctx.saved_tensors
        gain = magnitude / norm  # (out,)
        shape, grad = grad.shape, _flat(grad)  # (tokens, out)
        wide = torch.promote_types(grad.dtype, torch.float32)
        work = grad * _flat(y)  # (tokens, out)
        per_output = work.sum(0, dtype=wide)  # (out,)
        if bias is not None:
            per_output = per_output - bias.to(wide) * grad.sum(0, dtype=wide)
        grad_m = (per_output / magnitude).to(magnitude.dtype)
        if ctx.has_lost:
            grad_m[zero_rows] = (grad[:, zero_rows] * lost).sum(0, dtype=wide).to(magnitude.dtype)
        tokens = _flat(hidden)  # (tokens, rank)
        narrow = grad.to(hidden.dtype)  # (tokens, out)
        grad_hidden = narrow @ (ctx.scaling * gain[:, None] * lora_B).to(hidden.dtype)  # (tokens, rank)
        grad_B = (ctx.scaling * gain)[:, None] * (narrow.T @ tokens).to(lora_B.dtype)  # (out, rank)
        grad_base = None
        if ctx.needs_input_grad[0]:
            fits = work.dtype == grad.dtype  # and then no second tensor of this size is made
            grad_base = torch.mul(grad, gain, out=work) if fits else (grad * gain).to(grad.dtype)  # (tokens, out)
            grad_base = grad_base.view(shape)
        return grad_base, grad_hidden.view(hidden.shape), grad_B, grad_m, None, None, None, None, None
