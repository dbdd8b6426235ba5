"""Claims that shapes decide: numbers of parameters, and bytes from the memory planner."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dora_lab.adapters import AdapterConfig, DoRALinear, LoRALinear
from dora_lab.claims.ledger import Outcome, verdict_of
from dora_lab.job import Job
from dora_lab.memory import plan
from dora_lab.shapes import SHAPES
from dora_lab.tables import METHOD_NAMES, read_published

RECIPE = {"length": 256, "base_precision": "float16", "dropout": 0.05}  # of the report's code


def saving(claimed: Mapping[str, Any]) -> Outcome:
    """Share of a square weight's numbers that LoRA of a rank does not train."""
    features, rank = claimed["features"], claimed["rank"]
    layer = LoRALinear(nn.Linear(features, features, bias=False), AdapterConfig("lora", rank=rank, alpha=rank))
    trained, full = layer.lora_A.numel() + layer.lora_B.numel(), layer.base.weight.numel()
    saved = 100 * (1 - trained / full)
    verdict = "holds" if round(saved) == claimed["percent"] else "does not hold"
    return Outcome(verdict, f"{saved:.2f} % less: {trained:,} of {full:,}", f"a layer {features} × {features}")


def magnitude_entries(claimed: Mapping[str, Any]) -> Outcome:
    """Numbers in the magnitude of one DoRA layer."""
    out, inp = claimed["out"], claimed["in"]
    layer = DoRALinear(nn.Linear(inp, out, bias=False), AdapterConfig("dora", rank=1, alpha=1))
    entries = layer.magnitude.numel()
    verdict = "holds" if entries == claimed["entries"] else "does not hold"
    return Outcome(verdict, f"{entries:,} numbers, one for each output feature", f"a DoRA layer {inp} → {out}")


def published_shares(claimed: Mapping[str, Any]) -> Outcome:
    """The paper's column of trained parameters, recounted for one model."""
    shape, found = SHAPES[claimed["model"].lower()], []
    for row in read_published()["rows"]:
        if row["where"] == "Table 1" and row["model"] == claimed["model"]:
            share = 100 * _share(Job(shape, row["method"], row["rank"]))
            found.append((METHOD_NAMES[row["method"]], row["rank"], share, row["trainable_params_pct"]))
    agreed = [round(share, 2) == printed for _, _, share, printed in found]
    number = "; ".join(f"{name} r={rank} {share:.3f} %, printed {printed}" for name, rank, share, printed in found)
    return Outcome(verdict_of(agreed), number, f"{shape.name}'s shapes, share of the adapted model's total")


def magnitude_on_more_modules(claimed: Mapping[str, Any]) -> Outcome:
    """Low-rank directions on some modules and magnitudes on all: the share that is trained."""
    shape = SHAPES["llama-7b"]
    low_rank = Job(shape, "lora", claimed["rank"], target_modules=tuple(claimed["directions"])).trained
    magnitudes = shape.layers * sum(shape.linears[name][0] for name in claimed["magnitudes"])
    trained = low_rank + magnitudes
    share = 100 * trained / (shape.parameters + trained)
    verdict = "holds" if round(share, 2) == claimed["percent"] else "does not hold"
    return Outcome(verdict, f"{share:.3f} %: {trained:,} parameters", f"{shape.name}'s shapes")


def extra_parameters(claimed: Mapping[str, Any]) -> Outcome:
    """What DoRA trains beyond LoRA of the same rank, in percent of the model."""
    shape, rank = SHAPES["llama-7b"], claimed["rank"]
    lora, dora = Job(shape, "lora", rank), Job(shape, "dora", rank)
    extra = 100 * (_share(dora) - _share(lora))
    verdict = "holds" if extra < claimed["below_percent"] else "does not hold"
    number = f"{dora.trained - lora.trained:,} more than {lora.trained:,}: {extra:.3f} % of the model"
    return Outcome(verdict, number, f"{shape.name}'s shapes, rank {rank}")


def aggregated_memory(claimed: Mapping[str, Any]) -> Outcome:
    """Whether the GPU is too small for the aggregated data: with and without the checkpointing that was asked for."""
    shape, room = SHAPES["llama-7b"], claimed["gigabytes"]
    plans = {on: plan(shape, method="dora", checkpointing=on, **RECIPE) for on in (False, True)}
    without, on = (plans[key].total / 1e9 for key in (False, True))
    verdict = "does not hold" if plans[True].fits[room] else "holds"
    number = f"{without:.1f} GB without checkpointing, {on:.1f} GB with it; the number of examples does not enter"
    return Outcome(verdict, number, f"memory plan of {shape.name}, DoRA, {plans[True].job.batch} × {RECIPE['length']}")


def nearly_full(claimed: Mapping[str, Any]) -> Outcome:
    """How full the GPU is with the report's recipe; its text names no micro-batch, so that one which does is enough."""
    shape, room = SHAPES["llama-7b"], claimed["gigabytes"]
    totals = {b: plan(shape, method="dora", batch=b, checkpointing=False, **RECIPE).total / 1e9 for b in (4, 8, 16)}
    near = [claimed["from_share"] * room <= total <= room for total in totals.values()]
    number = ", ".join(f"{total:.1f} GB at a micro-batch of {batch}" for batch, total in totals.items())
    verdict = "holds" if any(near) else "depends"
    return Outcome(verdict, number, f"memory plan of {shape.name}, DoRA, {RECIPE['length']} tokens, no checkpointing")


def axis_of_magnitude(claimed: Mapping[str, Any]) -> Outcome:
    """Whether m, set to the norms of W0's rows, makes the start of training the base model."""
    out, inp = claimed["out"], claimed["in"]
    torch.manual_seed(0)
    base = nn.Linear(inp, out, bias=False)
    layer = DoRALinear(base, AdapterConfig("dora", rank=4, alpha=8))
    x = torch.randn(8, inp)
    with torch.no_grad():
        change = (layer(x) - base(x)).abs().max().item()
    verdict = "holds" if change < claimed["below"] else "does not hold"
    return Outcome(verdict, f"largest change of the output {change:.1g}", f"a DoRA layer {inp} → {out} before training")


def _share(job: Job) -> float:
    """Trained numbers over all numbers of the adapted model."""
    return job.trained / (job.shape.parameters + job.trained)
