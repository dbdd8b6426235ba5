"""What DoRA costs beside LoRA: the time of a step and the bytes it keeps, ours and PEFT's, in one process.

Every variant is a copy of the same random Llama. Variants take turns step by step, so that what disturbs the machine
disturbs them alike; what is quoted is the median over turns and its ratio to LoRA's of the same run.
"""

import gc
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_lab.adapters import LLAMA_TARGETS, AdapterConfig, attach, merge
from dora_lab.kernels import adapted_norm, norm_kind, squared_norm
from dora_lab.measured import finished_rows, write
from dora_lab.models import checkpoint_layers
from dora_lab.quantised import quantise
from dora_lab.records import environment

VARIANTS = ("base", "lora", "lora-peft", "dora", "dora-reference", "dora-peft", "dora-peft-sped-up")
EVALUATED = (*VARIANTS, "dora-merged")
PRECISIONS = ("float32", "bfloat16", "nf4")


@dataclass(frozen=True)
class Setting:
    """One shape and way of training. `batch` x `length` tokens a micro-batch, `accumulation` micro-batches a step.

    precision: of the frozen base. "nf4" keeps its linear layers in 4 bits (bitsandbytes) and computes in bfloat16.
    """

    batch: int
    length: int
    dropout: float = 0.0
    accumulation: int = 1
    checkpointing: bool = False
    hidden: int = 512
    layers: int = 4
    rank: int = 16
    precision: str = "float32"

    @property
    def name(self) -> str:
        parts = [f"hidden {self.hidden}, rank {self.rank}, {self.batch} x {self.length}"]
        parts += [self.precision] if self.precision != "float32" else []
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
LLAMA_7B = {"hidden": 4096, "layers": 2}  # its layers; two of its 32 are enough for ratios
CUDA_SETTINGS = (
    *(
        Setting(batch, length, rank=rank, precision=precision, **LLAMA_7B)
        for precision in ("bfloat16", "nf4")
        for batch, length in ((16, 512), (4, 2048))
        for rank in (32, 384)
    ),
    Setting(16, 512, dropout=0.05, rank=32, precision="bfloat16", **LLAMA_7B),
    Setting(16, 512, checkpointing=True, rank=32, precision="bfloat16", **LLAMA_7B),
    Setting(4, 512, accumulation=4, rank=32, precision="bfloat16", **LLAMA_7B),
    Setting(4, 512, accumulation=4, checkpointing=True, rank=32, precision="bfloat16", **LLAMA_7B),
)
NORM_SHAPES = ((512, 512), (1376, 512), (512, 1376), (2048, 2048))
LLAMA_7B_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))


def build(variant: str, setting: Setting, device: str = "cpu") -> nn.Module:
    """A random Llama with the variant's adapters, in training.

    Raises ValueError for an unknown variant or precision.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from dora_lab.speedup import speed_up

    if variant not in EVALUATED:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(EVALUATED)}")
    if setting.precision not in PRECISIONS:
        raise ValueError(f"unknown precision {setting.precision!r}: choose one of {', '.join(PRECISIONS)}")
    dtype = torch.float32 if setting.precision == "float32" else torch.bfloat16
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=setting.hidden,
        intermediate_size=setting.hidden * 43 // 16 // 32 * 32,  # LLaMA's 11008 / 4096
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.hidden // (128 if setting.hidden >= 4096 else 64),
        use_cache=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    if setting.precision == "nf4":
        quantise(model, "nf4", dtype, device)
    rank, method = setting.rank, variant.split("-")[0]
    if variant in ("lora", "dora", "dora-reference", "dora-merged"):
        kernel = "reference" if variant.endswith("reference") else "fast"
        attach(model, AdapterConfig(method, rank, 2 * rank, setting.dropout, kernel=kernel))
    elif variant != "base":
        model = peft_adapted(model, method, rank, setting.dropout)
        if variant.endswith("sped-up"):
            speed_up(model)
    for name, parameter in model.named_parameters():  # away from B = 0, where a half of the work is multiplying zeros
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    if variant == "dora-merged":
        merge(model)
    model.enable_input_require_grads()  # the frozen base has a backward too
    if setting.checkpointing:
        checkpoint_layers(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return model.train()


def peft_adapted(model: nn.Module, method: str, rank: int, dropout: float) -> nn.Module:
    """PEFT's LoRA or DoRA on the layers that the paper adapts, with alpha twice the rank."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        use_dora=method == "dora",
        target_modules=list(LLAMA_TARGETS),
    )
    return get_peft_model(model, config)


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
    saved: list[weakref.ref[_Saved]] = []  # what the graph has let go by the end of the forward is not counted

    def pack(tensor: Tensor) -> _Saved:
        box = _Saved(tensor)
        saved.append(weakref.ref(box))
        return box

    model(input_ids=tokens, labels=tokens).loss.backward()  # what a first call alone computes is not counted
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        output = model(input_ids=tokens, labels=tokens)
    storages = [box.tensor.untyped_storage() for box in (ref() for ref in saved) if box is not None]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}
    del output
    return sum(kept.values())


@dataclass(eq=False)
class _Saved:
    """A tensor that autograd keeps."""

    tensor: Tensor


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


def measure_norms(shapes: tuple[tuple[int, int], ...], turns: int, device: str = "cpu") -> list[dict]:
    """Seconds of the dense and of the factored norm for weights (out, in) and ranks from 1 to their size, in turns."""
    rows = []
    for out_features, in_features in shapes:
        weight = torch.randn(out_features, in_features, device=device)
        squares = squared_norm(weight)
        for rank in (4, 16, 64, 256, 384, 512):
            if rank <= min(weight.shape):
                A, B = torch.randn(rank, in_features, device=device), torch.randn(out_features, rank, device=device)
                ways = {
                    kind: lambda kind=kind, w=weight, a=A, b=B, q=squares: adapted_norm(w, a, 0.01 * b, 1.0, q, kind)
                    for kind in ("dense", "factored")
                }
                seconds = {kind: statistics.median(times) for kind, times in interleaved(ways, turns).items()}
                row = {"out": out_features, "in": in_features, "rank": rank}
                row |= {f"{kind}_s": value for kind, value in seconds.items()}
                rows.append(row | {"chosen": norm_kind(out_features, in_features, rank)})
    return rows


def measure(setting: Setting, turns: int, device: str = "cpu") -> list[dict]:
    """One row a variant. Times in seconds over `turns`, bytes, and ratios to LoRA's time of the same turn."""
    import peft.tuners.lora.dora as pefts

    models = {variant: build(variant, setting, device) for variant in EVALUATED}
    steps = {variant: make_step(models[variant], setting) for variant in VARIANTS}
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
    rows = []
    for variant, model in models.items():
        row = {"setting": asdict(setting), "variant": variant}
        row |= {f"evaluation_{key}": value for key, value in _spread(evaluation[variant], evaluation["lora"]).items()}
        if variant in VARIANTS:
            row |= {f"step_{key}": value for key, value in _spread(training[variant], training["lora"]).items()}
            row["saved_bytes"], row["peak_bytes"] = saved_bytes(model, setting), peak_bytes(steps[variant])
            row["norms_per_step"] = statistics.mean(norms[variant]) / (turns + 1) if norms[variant] else None
        rows.append(row)
    return rows


def run(
    settings: tuple[Setting, ...] | None = None,
    turns: int = 15,
    report: Callable[[str], None] = print,
    norm_shapes: tuple[tuple[int, int], ...] | None = None,
    partial: Path | None = None,
) -> dict:
    """Measure every setting and variant, and the two norms; returns what `measured.write` writes.

    On a CUDA device the settings are LLaMA-7B's layers unless others are given. `partial`: a file that keeps finished
    settings; those that it has, from the same machine with the same versions and turns, are not measured again.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = settings or (CUDA_SETTINGS if device == "cuda" else CPU_SETTINGS)
    found = {"environment": environment(torch.get_num_threads()), "turns": turns, "rows": []}
    before = finished_rows(partial, found)
    rows = found["rows"]
    for number, setting in enumerate(settings, 1):
        kept = [row for row in before if row["setting"] == asdict(setting)]
        new = kept or measure(setting, turns, device)
        ratios = ", ".join(f"{row['variant']} {row['step_to_lora']:.2f}" for row in new if "step_to_lora" in row)
        report(f"[{number}/{len(settings)}] {setting.name}: a step in LoRA's steps: {ratios}")
        rows += new
        if partial:
            write(found, partial)
        gc.collect()
    norm_shapes = norm_shapes or (LLAMA_7B_SHAPES if device == "cuda" else NORM_SHAPES)
    return found | {"norms": measure_norms(norm_shapes, turns, device)}


def _spread(seconds: list[float], loras: list[float]) -> dict[str, float]:
    """Median and quartiles of the seconds, and of the ratio to LoRA's seconds in the same turn."""
    low, median, high = statistics.quantiles(seconds, n=4)
    found = {"median_s": median, "low_quartile_s": low, "high_quartile_s": high}
    ratios = statistics.quantiles([own / lora for own, lora in zip(seconds, loras, strict=True)], n=4)
    return found | dict(zip(("to_lora_low", "to_lora", "to_lora_high"), ratios, strict=True))
