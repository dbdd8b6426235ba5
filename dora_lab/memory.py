"""How many bytes a training run needs at its peak, from shapes alone: nothing is built, nothing is run.

    weights + adapter + optimizer + norms      are there all the time
    gradients, activations, logits, workspace  come and go: the plan is of the moment when all together are most

It does not depend on the number of examples. A GB is 1000³ bytes.

Not counted: the CUDA context, the allocator's gaps and cuBLAS's workspace. `fits` leaves `RESERVED_BYTES` for them,
which is an assumption.
"""

from dataclasses import dataclass, replace
from typing import Any

from dora_lab.activations import moments
from dora_lab.job import FLOAT, Job
from dora_lab.shapes import Shape

GPUS = (16, 24, 40, 80)
RESERVED_BYTES = 1_000_000_000
ANSWER_TOKENS = 32  # more than an answer of LLM-Adapters has
PARTS = ("weights", "adapter", "optimizer", "gradients", "activations", "logits", "workspace", "norms")


@dataclass(frozen=True)
class Plan:
    """Bytes at the peak, part by part. `peak_at` says when that is; `job` what was planned.

    weights: the frozen base, or all of the model. adapter: A, B and m in float32. activations: what autograd keeps.
    logits: the loss's own tensors. workspace: of the backward, or of the optimizer. norms: DoRA's, kept and in making.
    """

    job: Job
    peak_at: str
    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    workspace: int
    norms: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def fits(self) -> dict[int, bool]:
        """{GB of a GPU: whether the total and `RESERVED_BYTES` go into it}."""
        return {size: self.total + RESERVED_BYTES <= size * 10**9 for size in GPUS}


def plan(shape: Shape, **choices: Any) -> Plan:
    """The plan of `Job(shape, **choices)`, at the moment of its peak. Raises ValueError as `Job` does."""
    return plan_job(Job(shape, **choices))


def plan_job(job: Job) -> Plan:
    """The plan of a job, at the moment of its peak."""
    constant = {"weights": weight_bytes(job), "adapter": 0, "optimizer": optimizer_bytes(job)}
    if job.method != "full":
        constant["adapter"] = job.trained * FLOAT
    found = {moment: constant | parts for moment, parts in moments(job).items()}
    peak_at = max(found, key=lambda moment: sum(found[moment].values()))
    return Plan(job, peak_at, **{part: found[peak_at].get(part, 0) for part in PARTS})


def changes(plan: Plan) -> list[tuple[str, Plan]]:
    """(what to change, the plan with it) for every single change that needs less, the least first.

    All but the precision of the base and of the optimizer leave what is learned as it is.
    """
    job = plan.job
    tried: dict[str, dict[str, Any]] = {}
    if not job.checkpointing:
        tried["gradient checkpointing"] = {"checkpointing": True}
    if job.method == "dora-peft":
        tried["this project's DoRA layer"] = {"method": "dora"}
    if job.method != "full" and not job.base_precision.startswith("nf4"):
        tried["base in NF4"] = {"base_precision": "nf4"}
    if job.batch > 1:
        half = (job.batch + 1) // 2
        tried[f"micro-batch of {half}, twice a step"] = {"batch": half, "accumulation": 2 * job.accumulation}
    if job.logit_columns is None and job.length > ANSWER_TOKENS:
        tried[f"logits of {ANSWER_TOKENS} answer positions only"] = {"logit_columns": ANSWER_TOKENS}
    if job.optimizer == "adamw":
        tried["8-bit optimizer"] = {"optimizer": "adamw-8bit"}
    found = [(name, plan_job(replace(job, **change))) for name, change in tried.items()]
    return sorted([one for one in found if one[1].total < plan.total], key=lambda one: one[1].total)


def longest(shape: Shape, gigabytes: int, **choices: Any) -> int:
    """The longest sequence whose plan, with `RESERVED_BYTES`, goes into a GPU of so many GB; 0 if not one token does.

    choices: `Job`'s, without length. Raises ValueError as `Job` does.
    """
    low, high = 0, 1
    while plan(shape, length=high, **choices).total + RESERVED_BYTES <= gigabytes * 10**9:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = plan(shape, length=middle, **choices).total + RESERVED_BYTES <= gigabytes * 10**9
        low, high = (middle, high) if fits else (low, middle)
    return low


def answer(plan: Plan, gigabytes: int) -> str:
    """In a line: whether it fits, what most of it is, and the one change that helps most."""
    room = gigabytes * 10**9 - RESERVED_BYTES
    part = max(PARTS, key=lambda name: getattr(plan, name))
    need = f"{plan.total / 1e9:.1f} GB at {plan.peak_at}, {getattr(plan, part) / 1e9:.1f} of them {part}"
    if plan.total <= room:
        return f"{need}: fits on {gigabytes} GB, whatever the number of examples"
    text = f"{need}: {gigabytes} GB are not enough, whatever the number of examples"
    for name, changed in changes(plan)[:1]:
        verdict = "which fits" if changed.total <= room else "which is still too much"
        text += f"; with {name}: {changed.total / 1e9:.1f} GB, {verdict}"
    return text


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Rows of a table: each part with its bytes and its share of the total in percent."""
    return [
        {"part": part, "bytes": getattr(plan, part), "percent": 100 * getattr(plan, part) / plan.total}
        for part in PARTS
    ]


def weight_bytes(job: Job) -> int:
    """Bytes of the base model. 8-bit rows have a float32 scale; NF4 blocks of 64 a float32 one, or, doubly quantised,
    one of a byte, with a float32 for 256 of those."""
    shape = job.shape
    numbers = sum(out * inp for out, inp in shape.linears.values())
    if job.base_precision == "int8":
        linear = numbers + FLOAT * sum(out for out, _ in shape.linears.values())
    elif job.base_precision == "nf4":
        linear = numbers // 2 + FLOAT * numbers // 64
    elif job.base_precision == "nf4-double":
        linear = numbers // 2 + numbers // 64 + FLOAT * numbers // (64 * 256)
    else:
        linear = numbers * job.item
    return shape.layers * (linear + 2 * shape.hidden * job.item) + shape.outer_parameters * job.item


def optimizer_bytes(job: Job) -> int:
    """Bytes of AdamW's two states on the device. The 8-bit ones have a float32 scale for 256 numbers."""
    return {
        "adamw": 2 * job.trained_item * job.trained,
        "adamw-8bit": 2 * job.trained + 2 * FLOAT * job.trained // 256,
        "paged-adamw": 0,
    }[job.optimizer]
