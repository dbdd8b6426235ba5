"""What to adapt and how: `AdapterConfig`, checked when it is made."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

METHODS = ("full", "lora", "dora", "dora-magnitude")
MODULE_METHODS = ("lora", "dora", "dora-magnitude", "frozen")
INITIALISATIONS = ("kaiming", "pissa")
DROPOUTS = ("low-rank", "faithful")
KERNELS = ("fast", "reference")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# What a module's own configuration has: it was chosen by the patterns, which are not checked anew for every module.
_NO_PATTERNS = {"rank_pattern": {}, "alpha_pattern": {}, "method_pattern": {}}


@dataclass(frozen=True)
class AdapterConfig:
    """What to adapt and how. `lora` and `dora` need a rank and an alpha; the other methods have no low-rank matrices.

    method: `full` (train everything), `lora`, `dora`, `dora-magnitude` (train m only; directions stay W0's).
    dropout: probability, on what the adapter reads; the frozen layer itself always reads all of x.
    target_modules: names of linear layers, matched as PEFT does: the whole name, or all that follows a dot.
    rank_pattern, alpha_pattern: {regular expression for the end of a module's name: its rank or alpha}, as PEFT's.
    use_rslora: s = alpha / √rank (arXiv 2312.03732) instead of alpha / rank.
    method_pattern: {regular expression for the end of a module's name: lora, dora, dora-magnitude or frozen}; the first
    key that matches counts, other targets have `method`. The paper's Table 6: `dora`, with `dora-magnitude` in here.
    initialisation: "kaiming" (B = 0) or "pissa": A and B start as W0's largest singular triples. See `pissa`.
    dropout_on: "low-rank" or "faithful"; kernel: "fast" or "reference". See `DoRALinear`.
    The targets and patterns are copied. Raises ValueError for values that make no adapter.
    """

    method: str
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = LLAMA_TARGETS
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    method_pattern: dict[str, str] = field(default_factory=dict)
    initialisation: str = "kaiming"
    dropout_on: str = "low-rank"
    kernel: str = "fast"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.method in ("lora", "dora"):
            if not _is_rank(self.rank):
                raise ValueError(f"rank must be a whole number of at least 1 for {self.method}, got {self.rank!r}")
            if not _is_alpha(self.alpha):
                raise ValueError(f"alpha must be a number above 0 for {self.method}, got {self.alpha!r}")
        elif self.rank is not None or self.alpha is not None:
            raise ValueError(f"method {self.method!r} has no low-rank matrices: leave rank and alpha out")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        targets = self.target_modules
        targets = tuple(targets) if isinstance(targets, Iterable) and not isinstance(targets, str) else ()
        if not targets or not all(isinstance(target, str) for target in targets):
            raise ValueError(
                f"target_modules must be a list of layer names such as q_proj, v_proj, got {self.target_modules!r}"
            )
        choices = (("dropout_on", DROPOUTS), ("kernel", KERNELS), ("initialisation", INITIALISATIONS))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose {' or '.join(known)}")
        if self.initialisation == "pissa" and self.rank is None:
            raise ValueError(f"initialisation 'pissa' is for lora and dora: method {self.method!r} has no A and B")
        for name in ("rank_pattern", "alpha_pattern", "method_pattern"):
            _check_keys(name, getattr(self, name))
            object.__setattr__(self, name, dict(getattr(self, name)))  # not the caller's, who may change his
        self._check_method_pattern()
        for key, rank in self.rank_pattern.items():
            if not _is_rank(rank):
                raise ValueError(f"rank_pattern: the rank of {key!r} must be a whole number above 0, got {rank!r}")
        for key, alpha in self.alpha_pattern.items():
            if not _is_alpha(alpha):
                raise ValueError(f"alpha_pattern: the alpha of {key!r} must be a number above 0, got {alpha!r}")
        object.__setattr__(self, "target_modules", targets)  # a list from a YAML or JSON file

    def _check_method_pattern(self) -> None:
        if self.method_pattern and self.method == "full":
            raise ValueError("method_pattern chooses among adapters: method 'full' has none, leave the pattern out")
        for key, method in self.method_pattern.items():
            if method not in MODULE_METHODS:
                known = ", ".join(MODULE_METHODS)
                raise ValueError(f"method_pattern: unknown method {method!r} for {key!r}: choose one of {known}")
            if method in ("lora", "dora") and self.rank is None:
                raise ValueError(
                    f"method_pattern: {method} for {key!r} needs a rank and an alpha: take method lora or dora, "
                    f"and name the modules that get {self.method!r} in the pattern"
                )

    @property
    def scaling(self) -> float:
        """s = alpha / rank, or alpha / √rank. Raises ValueError for a method without low-rank matrices."""
        if self.rank is None:
            raise ValueError(f"method {self.method!r} has no low-rank matrices, so no scaling")
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def of_module(self, name: str) -> "AdapterConfig | None":
        """The configuration of one module, with the method, rank and alpha that the patterns give; None if frozen."""
        method = _value_for(name, self.method_pattern, self.method)
        if method == "frozen":
            return None
        if method not in ("lora", "dora"):
            return replace(self, method=method, rank=None, alpha=None, initialisation="kaiming", **_NO_PATTERNS)
        rank = _value_for(name, self.rank_pattern, self.rank)
        alpha = _value_for(name, self.alpha_pattern, self.alpha)
        return replace(self, method=method, rank=rank, alpha=alpha, **_NO_PATTERNS)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _check_keys(name: str, pattern: Any) -> None:
    """Raise ValueError unless a pattern is a mapping whose keys are regular expressions, alone and as they are used."""
    if not isinstance(pattern, Mapping):
        raise ValueError(f"{name} must map the ends of modules' names to values, got {pattern!r}")
    for key in pattern:
        if not isinstance(key, str):
            raise ValueError(f"{name}: the end of a module's name must be a text, got {key!r}")
        try:
            re.compile(key)
            re.compile(_end_of_name(key))  # flags such as (?i) are allowed at the start alone
        except (re.error, OverflowError) as error:  # OverflowError: a number of repeats that is too large
            raise ValueError(f"{name}: {key!r} is no regular expression ({error}): correct it") from error


def layer_of(name: str) -> int:
    """The number of a module's layer: the first number in its name. Raises ValueError if it has none."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ValueError(f"module {name!r} has no layer number in its name: give modules of a decoder's layers")
    return numbers[0]


def is_named(name: str, target: str) -> bool:
    """Whether a module's name is what a target says: the whole name, or all that follows a dot."""
    return name == target or name.endswith("." + target)


def fits_pattern(name: str, key: str) -> bool:
    """Whether a pattern's key is the end of a module's name, by PEFT's rule: the whole name, or all after a dot."""
    return re.match(_end_of_name(key), name) is not None


def _end_of_name(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _value_for(name: str, pattern: dict, default):
    return next((value for key, value in pattern.items() if fits_pattern(name, key)), default)
