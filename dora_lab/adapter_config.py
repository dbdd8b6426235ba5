"""What to adapt and how: `AdapterConfig`, checked when it is made."""

import math
import re
from dataclasses import dataclass, field, replace

METHODS = ("full", "lora", "dora", "dora-magnitude")
DROPOUTS = ("low-rank", "faithful")
KERNELS = ("fast", "reference")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how. `lora` and `dora` need a rank and an alpha; the other methods have no low-rank matrices.

    method: `full` (train everything), `lora`, `dora`, `dora-magnitude` (train m only; directions stay W0's).
    dropout: probability, on what the adapter reads; the frozen layer itself always reads all of x.
    target_modules: names of linear layers, matched as PEFT does: the whole name, or all that follows a dot.
    rank_pattern, alpha_pattern: {regular expression for the end of a module's name: its rank or alpha}, as PEFT's.
    use_rslora: s = alpha / √rank (arXiv 2312.03732) instead of alpha / rank.
    magnitude_only: targets of a `dora` model that get m and no low-rank matrices (the paper's Table 6).
    dropout_on: "low-rank" or "faithful"; kernel: "fast" or "reference". See `DoRALinear`.
    Raises ValueError for values that make no adapter.
    """

    method: str
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = LLAMA_TARGETS
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    magnitude_only: tuple[str, ...] = ()
    dropout_on: str = "low-rank"
    kernel: str = "fast"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.method in ("lora", "dora"):
            if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
                raise ValueError(f"rank must be a whole number of at least 1 for {self.method}, got {self.rank!r}")
            if self.alpha is None or not 0 < self.alpha < math.inf:
                raise ValueError(f"alpha must be a number above 0 for {self.method}, got {self.alpha!r}")
        elif self.rank is not None or self.alpha is not None:
            raise ValueError(f"method {self.method!r} has no low-rank matrices: leave rank and alpha out")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError(
                f"target_modules must be a list of layer names such as q_proj, v_proj, got {self.target_modules!r}"
            )
        if self.magnitude_only and self.method != "dora":
            raise ValueError(f"magnitude_only is for method 'dora', got {self.method!r}")
        for name, value, known in (("dropout_on", self.dropout_on, DROPOUTS), ("kernel", self.kernel, KERNELS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose {' or '.join(known)}")
        for name, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"rank_pattern: the rank of {name!r} must be a whole number above 0, got {rank!r}")
        for name in ("target_modules", "magnitude_only"):  # a list from a YAML or JSON file
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def scaling(self) -> float:
        """s = alpha / rank, or alpha / √rank. Raises ValueError for a method without low-rank matrices."""
        if self.rank is None:
            raise ValueError(f"method {self.method!r} has no low-rank matrices, so no scaling")
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def of_module(self, name: str) -> "AdapterConfig":
        """The configuration of one module: its own method, rank and alpha where a pattern or `magnitude_only` says."""
        if any(is_named(name, target) for target in self.magnitude_only):
            return replace(self, method="dora-magnitude", rank=None, alpha=None, magnitude_only=())
        if self.rank is None:
            return self
        rank, alpha = (
            next((value for key, value in pattern.items() if is_matched(name, key)), default)
            for pattern, default in ((self.rank_pattern, self.rank), (self.alpha_pattern, self.alpha))
        )
        return replace(self, rank=rank, alpha=alpha)


def is_named(name: str, target: str) -> bool:
    """Whether a module's name is what a target says: the whole name, or all that follows a dot."""
    return name == target or name.endswith("." + target)


def is_matched(name: str, key: str) -> bool:
    """Whether a key of a rank or alpha pattern, a regular expression, is for a module: PEFT's rule."""
    return re.match(rf"(.*\.)?({key})$", name) is not None
