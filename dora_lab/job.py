"""`Job`: what is trained and how, as far as memory is concerned."""

from dataclasses import dataclass

from dora_lab.adapters import LLAMA_TARGETS
from dora_lab.shapes import Shape

METHODS = ("full", "lora", "dora", "dora-peft")
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "nf4", "nf4-double")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw")
DEVICES = ("cuda", "cpu")
FLOAT = 4  # bytes of a float32: the adapter's, the norms' and the loss's precision


@dataclass(frozen=True)
class Job:
    """What is trained and how: a micro-batch of `batch` sequences of `length` tokens, padding included.

    method: "dora-peft" is PEFT's DoRA. dropout: on what the adapter reads. checkpointing: of every decoder layer.
    base_precision: of the decoder's linear layers; 8- and 4-bit ones compute in bfloat16, and all else is kept in that.
    optimizer: AdamW has two numbers of a parameter's own precision for each; the 8-bit one a byte each; the paged one
    keeps them where the GPU does not count them. accumulation: micro-batches a step. logit_columns: positions of a
    sequence that go through the output layer, all if None. Raises ValueError for values that make no run.
    """

    shape: Shape
    method: str = "dora"
    rank: int | None = 32
    batch: int = 16
    length: int = 512
    target_modules: tuple[str, ...] = LLAMA_TARGETS
    dropout: float = 0.05
    checkpointing: bool = True
    base_precision: str = "bfloat16"
    optimizer: str = "adamw"
    accumulation: int = 1
    logit_columns: int | None = None
    device: str = "cuda"

    def __post_init__(self):
        for name, known in (
            ("method", METHODS),
            ("base_precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("device", DEVICES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("batch", "length", "accumulation", "logit_columns") + (() if self.method == "full" else ("rank",)):
            value = getattr(self, name)
            if name == "logit_columns" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        if self.logit_columns and self.logit_columns > self.length:
            raise ValueError(f"logit_columns is {self.logit_columns}, a sequence has {self.length}: give no more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.method == "full":
            if self.quantised:
                raise ValueError(f"a base in {self.base_precision} cannot be trained in full: choose lora or dora")
            return
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError(f"target_modules must be a list such as q_proj, v_proj, got {self.target_modules!r}")
        for target in self.target_modules:
            if target not in self.shape.linears:
                known = ", ".join(self.shape.linears)
                raise ValueError(f"target module {target!r} is not in a Llama: choose of {known}")
            if self.rank > min(self.shape.linears[target]):
                out, inp = self.shape.linears[target]
                raise ValueError(f"rank {self.rank} is too large for {target} ({inp} -> {out})")
        object.__setattr__(self, "target_modules", tuple(dict.fromkeys(self.target_modules)))

    @property
    def name(self) -> str:
        """What a legend says of it."""
        method = {"full": "full", "lora": "LoRA", "dora": "DoRA", "dora-peft": "PEFT's DoRA"}[self.method]
        if self.method != "full":
            method += f" r={self.rank}"
        checkpointing = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{method}, {self.base_precision}, {self.batch} × {self.length}, {checkpointing}"

    @property
    def quantised(self) -> bool:
        return self.base_precision in ("int8", "nf4", "nf4-double")

    @property
    def item(self) -> int:
        """Bytes of a number that the base computes."""
        return 4 if self.base_precision == "float32" else 2

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """{name: (out, in)} of the adapted layers of one decoder layer."""
        linears = self.shape.linears
        return {} if self.method == "full" else {name: linears[name] for name in self.target_modules}

    @property
    def trained(self) -> int:
        """Trained numbers."""
        if self.method == "full":
            return self.shape.parameters
        own_magnitude = self.method != "lora"
        one = sum(self.rank * (out + inp) + own_magnitude * out for out, inp in self.targets.values())
        return self.shape.layers * one

    @property
    def trained_item(self) -> int:
        return self.item if self.method == "full" else FLOAT
