"""What a step of training holds that comes and goes: what is kept for the backward pass, and workspace.

What autograd keeps is counted tensor by tensor for transformers' Llama under SDPA attention without a padding mask, and
for `dora_lab`'s layers; memory that two operations share counts once. Sizes are bytes.
"""

from itertools import accumulate

from dora_lab.job import FLOAT, Job
from dora_lab.kernels import CHUNK_ELEMENTS

_READS = {"q_proj": "first norm", "k_proj": "first norm", "v_proj": "first norm", "o_proj": "attention"}
_READS |= {"gate_proj": "second norm", "up_proj": "second norm", "down_proj": "product"}
_OUTPUT_KEPT_ANYWAY = ("v_proj", "gate_proj", "up_proj")  # by attention, by SiLU, by the product


def layer_bytes(job: Job) -> int:
    """What autograd keeps of one decoder layer between forward and backward."""
    return sum(base_kept(job).values()) + sum(adapter_kept(job).values())


def kept_bytes(job: Job) -> int:
    """What autograd keeps of the whole forward, without the loss: with checkpointing, each layer's input alone."""
    shape, tokens = job.shape, job.tokens
    inputs = tokens * shape.hidden * job.item
    layers = shape.layers * (inputs if job.checkpointing else layer_bytes(job))
    rotary = 2 * job.length * shape.head_dim * job.item  # cosines and sines
    return layers + rotary + _last_norm(job)


def logit_bytes(job: Job) -> tuple[int, int]:
    """(kept between forward and backward, most at any time) for the loss: softmax in float32, its gradient, and that
    of the logits."""
    positions = job.batch * (job.logit_columns or job.length)
    numbers = positions * job.shape.vocabulary
    return FLOAT * numbers + 8 * positions, 3 * FLOAT * numbers + 8 * positions


def _last_norm(job: Job) -> int:
    kept = job.tokens * (job.shape.hidden + 1) * FLOAT
    return kept + (2 * job.tokens * job.shape.hidden * job.item if job.method == "full" else 0)


def base_kept(job: Job) -> dict[str, int]:
    """Bytes kept of one decoder layer by its own operations.

    A frozen linear layer keeps nothing. A norm keeps its input in float32 and one number a token; attention its query,
    key, value, output and one float32 a head; the MLP what goes into SiLU and both factors of the product.
    """
    shape, tokens, item = job.shape, job.tokens, job.item
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = {
        "norms": 2 * tokens * (shape.hidden + 1) * FLOAT,
        "attention": tokens * ((2 * queries + 2 * keys) * item + shape.heads * FLOAT),
        "mlp": 3 * tokens * shape.intermediate * item,
    }
    if job.method == "full" or job.base_precision == "int8":  # what a layer reads; bitsandbytes keeps it in 8 bits
        kept["inputs"] = tokens * (2 * shape.hidden + shape.intermediate) * item
    if job.method == "full":  # what a norm's own weight multiplies
        kept["norms"] += 2 * tokens * shape.hidden * item
    return kept


def adapter_kept(job: Job) -> dict[str, int]:
    """Bytes kept of one decoder layer for its adapters, {name of the linear layer: bytes}."""
    tokens, kept = job.tokens, {}
    read = {"attention"}  # kept by attention already
    for name, (out, inp) in job.targets.items():
        size = tokens * job.rank * FLOAT  # x·Aᵀ
        if job.dropout:
            size += tokens * inp * (FLOAT + _mask_item(job))
        elif job.item < FLOAT or _READS[name] not in read:  # a float32 copy each, or one tensor for all that read it
            size += tokens * inp * FLOAT
            read.add(_READS[name])
        if job.method == "lora":
            size += out * job.rank * FLOAT  # s·B
        elif job.method == "dora" and name not in _OUTPUT_KEPT_ANYWAY:
            size += tokens * out * job.item
        elif job.method == "dora-peft":  # the base product, the low-rank product, and with dropout W0 in float32
            size += tokens * out * ((FLOAT if job.dropout else job.item) + FLOAT)
            size += out * inp * FLOAT if job.dropout and job.item < FLOAT else 0
        kept[name] = size
    return kept


def _mask_item(job: Job) -> int:
    """Bytes of one entry of dropout's mask: a byte on CUDA, a float32 on the CPU."""
    return 1 if job.device == "cuda" else FLOAT


def moments(job: Job) -> dict[str, dict[str, int]]:
    """{moment: {part: bytes}} of what comes and goes, and the norms."""
    shape, item = job.shape, job.item
    kept, one_layer, last_norm = kept_bytes(job), layer_bytes(job), _last_norm(job)
    inputs = job.tokens * shape.hidden * item  # as much as the gradient of a layer's output
    norms, making = _norm_bytes(job)
    gradients = job.trained * job.trained_item
    early = first = late = gradients  # with more than one micro-batch they are there from the second on
    if job.accumulation == 1:
        early = 0
        output_layer = shape.vocabulary * shape.hidden * item if job.method == "full" else 0
        per_layer = shape.layer_parameters * item if job.method == "full" else gradients // shape.layers
        first, late = output_layer, gradients - per_layer - (0 if shape.tied else output_layer)
    again = 0
    if job.checkpointing:  # in float32 a norm keeps the layer's input itself
        again = one_layer - (inputs if item == FLOAT else 0)
    found = {
        "the norm of the last layer": {
            "gradients": early,
            "activations": kept - last_norm,
            "workspace": _product(job) + 2 * inputs,
            "norms": norms + making,
        },
        "the loss": {"gradients": early, "activations": kept, "logits": logit_bytes(job)[1], "norms": norms},
        "the backward of the last layer": {
            "gradients": first,
            "activations": kept - last_norm + again,
            "workspace": inputs + max(accumulate(_mlp_backward(job))),
            "norms": norms,
        },
        "the backward of the first layer": {
            "gradients": late,
            "activations": one_layer + (inputs if job.checkpointing and item < FLOAT else 0),
            "workspace": inputs + max(accumulate(_mlp_backward(job))),
            "norms": norms,
        },
        "the optimizer's step": {"gradients": gradients, "workspace": _step_workspace(job), "norms": norms},
    }
    if job.checkpointing:
        found["the second forward of the last layer"] = {
            "gradients": first,
            "activations": kept - last_norm + again,
            "workspace": inputs + _mlp_forward(job),
            "norms": norms + (making if job.method == "dora-peft" else 0),
        }
    return found


def _wide(job: Job) -> int:
    """Numbers in what the MLP has between its layers."""
    return job.tokens * job.shape.intermediate


def _step_workspace(job: Job) -> int:
    """AdamW's: on CUDA the roots of all second moments at once, on the CPU three times the largest parameter."""
    if job.optimizer != "adamw":
        return 0
    if job.device == "cuda":
        return job.trained * job.trained_item
    linears = [out * inp for out, inp in job.shape.linears.values()]
    low_rank = [job.rank * max(shape) for shape in job.targets.values()]
    return 3 * job.trained_item * max(low_rank or [*linears, job.shape.vocabulary * job.shape.hidden])


def _norm_bytes(job: Job) -> tuple[int, int]:
    """(kept for as long as the model lives, most while one norm is made) of DoRA's norms."""
    if job.method not in ("dora", "dora-peft"):
        return 0, 0
    shapes = job.targets.values()
    if job.method == "dora-peft":  # an identity, B·A, s·B·A and W0 + s·B·A, all (out, in) and in float32
        copies = 3 + (job.item < FLOAT)
        return 0, max((inp * inp + copies * out * inp) * FLOAT for out, inp in shapes)
    whole = {"int8": FLOAT, "nf4": 2, "nf4-double": 2}.get(job.base_precision, 0)  # bytes of W0 dequantised
    making = [
        out * inp * whole
        + 2 * out * job.rank * FLOAT  # W0·Aᵀ, in parts and together
        + (min(out * inp, CHUNK_ELEMENTS) * FLOAT if job.item < FLOAT else 0)
        for out, inp in shapes
    ]
    return job.shape.layers * sum(2 * out * FLOAT for out, _ in shapes), max(making)  # ‖W0‖² and the norm


def _product(job: Job) -> int:
    """Bytes of what the down projection reads, unless its adapter keeps it."""
    kept = job.item == FLOAT and "down_proj" in job.targets and not job.dropout
    return 0 if kept else _wide(job) * job.item


def _mlp_forward(job: Job) -> int:
    """Most bytes beyond what is kept while a layer's MLP is computed again, at its up or at its down projection."""
    out, narrow = job.tokens * job.shape.hidden, job.item < FLOAT
    there = out * job.item * ((narrow or job.dropout > 0) + narrow)  # the second norm's output, the residual
    at_down = _product(job) + out * job.item
    if "down_proj" in job.targets:
        copied = _wide(job) * FLOAT if narrow and job.dropout else 0  # what dropout reads
        if job.method == "dora":  # its output is kept, and comes last
            at_down += max(copied, out * 2 * FLOAT if narrow else 0) - out * job.item
        else:
            at_down += copied
            there += out * (FLOAT + job.item) if narrow else 0  # gradients cast before what was kept is asked for
    at_up = 0
    if "up_proj" in job.targets and (narrow or job.method != "dora"):
        mixed = FLOAT if narrow and job.device == "cpu" and job.method != "dora" else 0  # cast before it is added
        at_up = _wide(job) * (2 * FLOAT + mixed) - adapter_kept(job).get("down_proj", 0)  # not there yet
    return there + max(at_up, at_down)


def _mlp_backward(job: Job) -> list[int]:
    """Bytes taken (+) and given back (-) one after another in the backward of a decoder layer's MLP, down to up.

    The gradient of the layer's output is there before. The rest of a layer's backward needs less.
    """
    out, wide, item = job.tokens * job.shape.hidden, _wide(job), job.item  # out, wide: numbers
    down, up = "down_proj" in job.targets, "up_proj" in job.targets
    cast = FLOAT if item < FLOAT else 0  # bytes of a float32 copy, where the base is narrower
    last = cast if job.device == "cpu" else item  # the CPU casts before it multiplies
    own = item + (2 * cast + last if cast else 0)  # of DoRA's product: gradient times output, two copies, the result
    dequantised = job.shape.hidden * job.shape.intermediate * (2 if job.quantised else 0)
    steps = []
    if down:
        first = own if job.method == "dora" else cast + (item if cast else 0)
        steps += [out * first, -out * first]  # the base's own gradient stays, the output is freed
        steps += [wide * FLOAT, -wide * FLOAT]  # of what A read; that is freed
        if job.dropout:
            steps += [wide * FLOAT, -wide * (FLOAT + _mask_item(job))]
        steps += [wide * item - wide * FLOAT] if cast else []
    steps += [wide * item + dequantised, -dequantised]  # the base's
    if down:
        steps += [wide * item - (out * item if job.method == "dora" else 0), -2 * wide * item]  # the sum of both
    if job.method == "full":
        steps += [job.shape.hidden * job.shape.intermediate * item, -wide * item]  # W's gradient; its input is freed
    steps += [2 * wide * item, -2 * wide * item]  # of both factors; the product's, and SiLU's output, are freed
    if up and job.method == "dora":
        steps += [wide * own]
    elif up and job.method == "lora":
        steps += [-wide * item, wide * cast]
    elif up:
        steps += [wide * (cast + FLOAT)]
    return steps
