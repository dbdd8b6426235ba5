"""Claims that a small model decides: what autograd keeps, and what a merged layer computes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dora_lab.adapters import AdapterConfig, attach, dora_norm, lora_weight, merge
from dora_lab.bench import Setting, build, saved_bytes
from dora_lab.claims.ledger import NotHere, Outcome
from dora_lab.job import Job
from dora_lab.shapes import SHAPES


def detached_memory(claimed: Mapping[str, Any]) -> Outcome:
    """What the norm's own backward keeps of one layer, scaled to the adapted weights of LLaMA-7B in 16 bits."""
    out, inp, rank = 96, 160, 4
    kept = {detach: _kept_by_norm(out, inp, rank, detach) for detach in (True, False)}
    weights_kept = (kept[False] - kept[True]) // (4 * out * inp)  # whole copies of a weight, in float32
    job = Job(SHAPES["llama-7b"], "dora", 32)
    adapted = job.shape.layers * sum(o * i for o, i in job.targets.values())
    extra = 2 * weights_kept * adapted / 1e9
    percent = 100 * extra / (claimed["with_gigabytes"] + extra)
    verdict = "holds" if abs(percent - claimed["percent"]) < 1 else "does not hold"
    kept_too = f"{weights_kept} copy of each adapted weight is kept without detaching"
    number = f"{kept_too}: {extra:.1f} GB in 16 bits, {percent:.1f} %"
    return Outcome(verdict, number, f"one small layer, scaled to {job.shape.name}; the whole is the paper's own figure")


def detached_accuracy(claimed: Mapping[str, Any]) -> Outcome:
    """Needs both ways of training on LLaMA-7B."""
    raise NotHere("two fine-tuned LLaMA-7B, one with the norm in the graph: needs a large GPU and its weights")


def cost_of_training(claimed: Mapping[str, Any]) -> Outcome:
    """Bytes kept for the backward, DoRA's to LoRA's: this project's layer, and PEFT's."""
    setting = Setting(batch=4, length=64, hidden=256, layers=2)
    variants = ("lora", "lora-peft", "dora", "dora-peft")
    kept = {variant: saved_bytes(build(variant, setting), setting) for variant in variants}
    own, peft = kept["dora"] / kept["lora"], kept["dora-peft"] / kept["lora-peft"]
    more = [own > claimed["above_ratio"], peft > claimed["above_ratio"]]
    verdict = "holds" if all(more) else "depends" if any(more) else "does not hold"
    number = f"{own:.2f} of LoRA's kept bytes with this project's layer, {peft:.2f} with PEFT's"
    return Outcome(verdict, number, f"a Llama of {setting.layers} layers ({setting.name}) on a CPU")


def merged_cost(claimed: Mapping[str, Any]) -> Outcome:
    """Operations of a forward after merging against the base model's, and how far the output moves."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **size)).eval()
    tokens = torch.arange(24)[None]
    base = _operations(model, tokens)
    attach(model, AdapterConfig("dora", rank=8, alpha=16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
        before, apart = model(tokens).logits, _operations(model, tokens)
        merged = _operations(merge(model), tokens)
        change = (model(tokens).logits - before).abs().max().item()
    verdict = "holds" if merged == base and change < 1e-4 else "does not hold"
    shares = f"{merged / base:.2f} of the base's operations merged, {apart / base:.2f} unmerged"
    number = f"{shares}; output moves by {change:.0e} at most"
    return Outcome(verdict, number, f"a random Llama of {model.config.num_hidden_layers} layers, DoRA")


def _kept_by_norm(out: int, inp: int, rank: int, detach: bool) -> int:
    """Bytes that autograd keeps of the norm of W0 + s·B·A, parameters not counted."""
    torch.manual_seed(0)
    base, down = torch.randn(out, inp), nn.Parameter(torch.randn(rank, inp))
    up, kept = nn.Parameter(torch.randn(out, rank)), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (base, down, up)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm = dora_norm(lora_weight(base, down, up, 2.0), detach=detach)  # (out,)
    del norm
    return sum(size for size, _ in kept.values())


def _operations(model: nn.Module, tokens: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens)
    return counter.get_total_flops()
