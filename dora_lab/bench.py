"""What DoRA costs beside LoRA: the time of a step and the bytes it keeps, ours and PEFT's, in one process.

Every variant is a copy of the same random Llama. Variants take turns step by step, so that what disturbs the machine
disturbs them alike; what is quoted is the median over turns and its ratio to LoRA's of the same run.
"""

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_lab.adapters import LLAMA_TARGETS, AdapterConfig, attach
from dora_lab.records import environment, write_text

VARIANTS = ("base", "lora", "lora-peft", "dora", "dora-reference", "dora-peft", "dora-peft-sped-up")


@dataclass(frozen=True)
class Setting:
    """One shape and way of training. `batch` x `length` tokens a micro-batch, `accumulation` micro-batches a step."""

    batch: int
    length: int
    dropout: float = 0.0
    accumulation: int = 1
    checkpointing: bool = False
    hidden: int = 512
    layers: int = 4
    rank: int = 16

    @property
    def name(self) -> str:
        parts = [f"hidden {self.hidden}, rank {self.rank}, {self.batch} x {self.length}"]
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        parts += [f"{self.accumulation} micro-batches"] if self.accumulation > 1 else []
        return ", ".join(parts + (["checkpointing"] if self.checkpointing else []))


CPU_SETTINGS = (
    Setting(4, 64),
    Setting(8, 128),
    Setting(16, 64),
    Setting(8, 128, dropout=0.05),
    Setting(8, 128, accumulation=4),
    Setting(8, 128, checkpointing=True),
    Setting(8, 128, accumulation=4, checkpointing=True),
)


def build(variant: str, setting: Setting, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random Llama with the variant's adapters, in training. Raises ValueError for an unknown variant."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from dora_lab.speedup import speed_up

    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=setting.hidden,
        intermediate_size=setting.hidden * 43 // 16 // 32 * 32,  # LLaMA's 11008 / 4096
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.hidden // 64,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device, dtype).requires_grad_(False)
    rank, method = setting.rank, variant.split("-")[0]
    if variant in ("lora", "dora", "dora-reference"):
        kernel = "reference" if variant.endswith("reference") else "fast"
        attach(model, AdapterConfig(method, rank, 2 * rank, setting.dropout, kernel=kernel))
    elif variant != "base":
        theirs = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=setting.dropout,
            use_dora=method == "dora",
            target_modules=list(LLAMA_TARGETS),
        )
        model = get_peft_model(model, theirs)
        if variant.endswith("sped-up"):
            speed_up(model)
    for name, parameter in model.named_parameters():  # away from B = 0, where a half of the work is multiplying zeros
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    model.enable_input_require_grads()  # the frozen base has a backward too
    if setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def make_step(model: nn.Module, setting: Setting) -> Callable[[], None]:
    """One training step on random tokens: forward, backward, `accumulation` times, and AdamW on what is trainable."""
    device = next(model.parameters()).device
    tokens = torch.randint(0, 1000, (setting.batch, setting.length), device=device)  # (batch, length)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        for _ in range(setting.accumulation):
            (model(input_ids=tokens, labels=tokens).loss / setting.accumulation).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


def make_evaluation(model: nn.Module, setting: Setting) -> Callable[[], None]:
    """One forward in evaluation."""
    tokens = torch.randint(0, 1000, (setting.batch, setting.length), device=next(model.parameters()).device)

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        model(input_ids=tokens)
        model.train()

    return evaluate


def saved_bytes(model: nn.Module, setting: Setting) -> int:
    """Bytes that autograd keeps between forward and backward: shared memory counted once, parameters not at all."""
    tokens = torch.randint(0, 1000, (setting.batch, setting.length), device=next(model.parameters()).device)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    model(input_ids=tokens, labels=tokens).loss.backward()  # what a first call alone computes is not counted
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=tokens, labels=tokens)
    total = sum(size for _, size in kept.values())
    del output
    return total


def peak_bytes(step: Callable[[], None]) -> int | None:
    """Most bytes allocated during a step beyond those before it; on the CPU as PyTorch's profiler counts them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def interleaved(steps: dict[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of every step, the variants taking turns in an order that rotates; one unmeasured turn first."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(-1, turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize()
            began = time.perf_counter()
            steps[name]()
            synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def run(
    settings: tuple[Setting, ...] = CPU_SETTINGS, turns: int = 15, report: Callable[[str], None] = print
) -> dict:
    """Measure every setting and variant; returns what `write` writes. Times in seconds, memory in bytes."""
    import peft.tuners.lora.dora as pefts

    rows = []
    for setting in settings:
        models = {variant: build(variant, setting) for variant in VARIANTS}
        steps = {variant: make_step(model, setting) for variant, model in models.items()}
        training = interleaved(steps, turns)
        norms = {
            variant: [module.cache.computed for module in model.modules() if getattr(module, "fast", False)]
            for variant, model in models.items()
        }
        pefts.ENABLE_DORA_CACHING = True  # its own switch, for inference
        try:
            evaluation = interleaved({v: make_evaluation(m, setting) for v, m in models.items()}, turns)
        finally:
            pefts.ENABLE_DORA_CACHING = False
        for variant, model in models.items():
            rows.append(
                {
                    "setting": asdict(setting),
                    "variant": variant,
                    **{f"step_{key}": value for key, value in _spread(training[variant]).items()},
                    **{f"evaluation_{key}": value for key, value in _spread(evaluation[variant]).items()},
                    "saved_bytes": saved_bytes(model, setting),
                    "peak_bytes": peak_bytes(steps[variant]),
                    "norms_per_step": statistics.mean(norms[variant]) / (turns + 1) if norms[variant] else None,
                }
            )
        lora = statistics.median(training["lora"])
        ratios = ", ".join(f"{v} {statistics.median(t) / lora:.2f}" for v, t in training.items() if v != "lora")
        report(f"{setting.name}: steps against LoRA's {lora:.3f} s: {ratios}")
        del models, steps
        gc.collect()
    threads = torch.get_num_threads()
    return {"environment": environment(threads) | {"machine": platform.machine()}, "turns": turns, "rows": rows}


def write(found: dict, path: Path) -> None:
    """Write what `run` returned as JSON, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")


def _spread(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_s": median, "low_quartile_s": low, "high_quartile_s": high}
