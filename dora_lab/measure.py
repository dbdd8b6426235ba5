"""Peak memory, step time and tokens a second of a whole model's training, beside what the planner says of it.

The weights are random and of the real shape: nothing is downloaded, and neither memory nor time depends on their
values. Under a cap of so many GB a variant that does not fit is recorded as such.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dora_lab.adapters import AdapterConfig, attach
from dora_lab.bench import peak_bytes, peft_adapted
from dora_lab.measured import finished_rows, write
from dora_lab.memory import PARTS, plan
from dora_lab.models import answer_logits, checkpoint_layers, load_model
from dora_lab.records import environment
from dora_lab.shapes import find_shape

VARIANTS = {"lora": ("lora", None), "dora": ("dora", None), "qdora": ("dora", "nf4"), "dora-peft": ("dora-peft", None)}


@dataclass(frozen=True)
class Workload:
    """What every variant does: steps on `batch` sequences of `length` random tokens, the last `logit_columns` labelled.

    model: a name of `dora_lab.shapes`. logit_columns None labels all. cap_gb: GB of a GPU that may be used.
    """

    model: str = "llama-7b"
    rank: int = 32
    batch: int = 16
    length: int = 512
    dropout: float = 0.05
    dtype: str = "bfloat16"
    checkpointing: bool = True
    logit_columns: int | None = None
    cap_gb: float | None = 40.0


def measure(
    workload: Workload,
    variants: tuple[str, ...] | None = None,
    steps: int = 10,
    report: Callable[[str], None] = print,
    partial: Path | None = None,
) -> dict:
    """What `measured.write` writes: the environment, the workload, the measured steps, and a row a variant.

    Peak bytes are those that PyTorch has allocated, weights included. `partial`: as in `bench.run`, for variants.
    Raises ValueError for an unknown variant or model, or a cap that the GPU does not have.
    """
    for name in variants or ():
        if name not in VARIANTS:
            raise ValueError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}")
    find_shape(workload.model)
    _set_cap(workload.cap_gb)
    found = {"environment": environment(torch.get_num_threads()), "workload": asdict(workload), "steps": steps}
    rows = found["rows"] = []
    before = {row["variant"]: row for row in finished_rows(partial, found)}
    for name in variants or tuple(VARIANTS):
        row = before.get(name) or _measure_one(name, workload, steps)
        rows.append(row)
        if partial:
            write(found, partial)
        if "error" in row:
            report(f"{name}: {row['error']}; planned {row['planned_bytes'] / 1e9:.2f} GB")
        else:
            report(
                f"{name}: {row['peak_bytes'] / 1e9:.2f} GB, planned {row['planned_bytes'] / 1e9:.2f}; "
                f"{row['step_median_s']:.3f} s a step, {row['tokens_per_s']:.0f} tokens/s"
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _measure_one(name: str, workload: Workload, steps: int) -> dict:
    device, synchronize = "cpu", lambda: None
    if torch.cuda.is_available():
        device, synchronize = "cuda", torch.cuda.synchronize
    method, quantisation = VARIANTS[name]
    planned = plan(
        find_shape(workload.model),
        method=method,
        rank=workload.rank,
        batch=workload.batch,
        length=workload.length,
        dropout=workload.dropout,
        checkpointing=workload.checkpointing,
        base_precision=quantisation or workload.dtype,
        logit_columns=workload.logit_columns,
        device=device,
    )
    row = {"variant": name, "planned_bytes": planned.total, "planned_peak_at": planned.peak_at}
    row |= {"planned_parts": {part: getattr(planned, part) for part in PARTS}}
    try:
        model = build(name, workload, device)
        step, held = make_step(model, workload)
        step()
        step()  # from here on everything that lasts is there
        synchronize()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            synchronize()
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        else:
            row["peak_bytes"] = held() + peak_bytes(step)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            synchronize()
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        row.pop("peak_bytes", None)
        return row | {"error": f"out of memory ({str(error).splitlines()[0]})"}
    median = statistics.median(seconds)
    row |= {"planned_to_measured": planned.total / row["peak_bytes"], "steps": steps, "step_median_s": median}
    return row | {"step_fastest_s": min(seconds), "tokens_per_s": workload.batch * workload.length / median}


def build(name: str, workload: Workload, device: str) -> nn.Module:
    """The variant's model with its adapters, in training."""
    method, quantisation = VARIANTS[name]
    model = load_model(f"random:{workload.model}", workload.dtype, device, quantisation=quantisation or "none")
    model.requires_grad_(False)
    if method == "dora-peft":
        model = peft_adapted(model, "dora", workload.rank, workload.dropout)
    else:
        attach(model, AdapterConfig(method, workload.rank, 2 * workload.rank, workload.dropout))
    if workload.checkpointing:
        checkpoint_layers(model.get_base_model() if method == "dora-peft" else model)
    return model.train()


def make_step(model: nn.Module, workload: Workload) -> tuple[Callable[[], None], Callable[[], int]]:
    """(one step of AdamW on random tokens, bytes of the parameters and optimizer states between two steps)."""
    device = next(model.parameters()).device
    vocabulary = find_shape(workload.model).vocabulary
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (workload.batch, workload.length), generator=generator).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    first = workload.length - 1 - (workload.logit_columns or workload.length - 1)
    rows, columns = torch.ones(workload.batch, workload.length - 1 - first, device=device).nonzero(as_tuple=True)
    columns = columns + first

    def step() -> None:
        if workload.logit_columns is None:
            loss = model(input_ids=ids, labels=ids).loss
        else:  # as a run does
            loss = F.cross_entropy(answer_logits(model, ids, rows, columns), ids[rows, columns + 1])
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    def held() -> int:
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        return sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers(), *states))

    return step, held


def _set_cap(gigabytes: float | None) -> None:
    if gigabytes is None or not torch.cuda.is_available():
        return
    total = torch.cuda.get_device_properties(0).total_memory
    if gigabytes * 10**9 > total:
        raise ValueError(f"the GPU has {total / 1e9:.1f} GB: give a cap of at most that, not {gigabytes:g}")
    torch.cuda.set_per_process_memory_fraction(gigabytes * 10**9 / total)
