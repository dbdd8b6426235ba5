"""What a run is: a `RunSpec`, from a profile or from the parameters of a notebook, and its identity."""

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dora_lab import tasks
from dora_lab.adapter_config import AdapterConfig
from dora_lab.data import data_sha256
from dora_lab.models import base_sha256
from dora_lab.profiles import (
    PROJECT,
    Initialisation,
    Method,
    ModuleMethod,
    Natural,
    Optimizer,
    Positive,
    Profile,
    Quantisation,
    Rate,
    explain,
    load_profile,
)

METHODS = Method.__args__
LOW_RANK = ("lora", "dora")
# The parameters of 07_fine_tune.ipynb and what each is read as; "" or None takes the profile's value.
PARAMETERS = {
    "profile": str,
    "task": str,
    "method": str,
    "rank": int,
    "seed": int,
    "learning_rate": float,
    "steps": int,
    "split": str,
    "runs_dir": str,
    "variant": str,
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RunSpec:
    """All that could change a run's result. `run_id` is a hash of it (the names of profile and variant aside).

    A field with a default came later than the first records: at its default it is left out of the hash, so that their
    identities stay.
    rank and alpha are None for `full` and `dora-magnitude`, which have no low-rank matrices.
    """

    profile: str
    task: str
    method: Method
    rank: Positive | None
    alpha: float | None
    seed: Natural
    learning_rate: Rate
    steps: Positive
    split: Literal["test", "validation"]
    base_model: str
    base_sha256: str
    data: str
    data_sha256: str
    target_modules: list[str]
    dropout: float
    prompt: str
    append_eos: bool
    cutoff_tokens: int | Literal["auto"]
    train_examples: int | None
    validation_examples: int | None
    test_examples: int | None
    batch_size: int
    gradient_accumulation: int
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    dtype: str
    evaluation_batch_size: int
    checkpoints: int
    geometry: bool
    threads: int
    evaluation: Literal["likelihood", "generate"] = "likelihood"
    revision: str | None = None
    tokenizer: str | None = None
    quantisation: Quantisation = "none"
    optimizer: Optimizer = "adamw"
    gradient_checkpointing: bool = False
    micro_batch_size: Positive | None = None
    length_grouped: bool = False
    train_on_prompt: bool = False
    cut: Literal["prompt", "end"] = "prompt"
    answers_cut: float = 0.0
    evaluation_prompt: str | None = None
    best_of_checkpoints: Positive | None = None
    rank_pattern: dict[str, Positive] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    variant: str | None = None
    method_pattern: dict[str, ModuleMethod] = dataclasses.field(default_factory=dict)
    initialisation: Initialisation = "kaiming"

    @property
    def kind(self) -> tuple[str, int | None, str | None]:
        """(method, rank, variant): what the runs of one row of a table have in common."""
        return self.method, self.rank, self.variant

    @property
    def adapter_config(self) -> AdapterConfig:
        """What is attached to the base. Raises ValueError for settings that make no adapter."""
        return AdapterConfig(
            self.method,
            self.rank,
            self.alpha,
            self.dropout,
            tuple(self.target_modules),
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            method_pattern=self.method_pattern,
            initialisation=self.initialisation,
        )

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation

    @classmethod
    def from_profile(
        cls,
        profile: Profile,
        task: str,
        method: str,
        rank: int | None = None,
        seed: int = 0,
        learning_rate: float | None = None,
        steps: int | None = None,
        split: str = "test",
        variant: str | None = None,
    ) -> "RunSpec":
        """The run of `profile` for one task, method, rank and seed; None takes the profile's, or the variant's, value.

        Raises ValueError for an unknown task, method, split or variant, or a value that is wrong or that the profile
        lacks; FileNotFoundError if the base model or the data is not there.
        """
        tasks.task(task)
        profile = profile.variant(variant)
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
        if rank is not None and method not in LOW_RANK:
            raise ValueError(f"method {method!r} has no rank: leave rank out, or choose {' or '.join(LOW_RANK)}")
        if learning_rate is None and task not in profile.learning_rate.get(method, {}):
            raise ValueError(
                f"profile {profile.name!r} has no learning rate for {method} on {task}: add one, or give learning_rate"
            )
        if steps is None and task not in profile.steps:
            raise ValueError(
                f"profile {profile.name!r} has no steps for {task}: it has {', '.join(profile.steps)}; or give steps"
            )
        if method == "full" and profile.quantisation != "none":
            raise ValueError(
                f"a base in {profile.quantisation} cannot be trained in full: choose lora, dora or dora-magnitude, or "
                "a profile with quantisation none"
            )
        if profile.best_of_checkpoints and split == "validation":
            raise ValueError(
                "best_of_checkpoints chooses on validation examples, which cannot be scored as well: take split test, "
                "or leave it out"
            )
        if method in LOW_RANK and rank is None:
            rank = profile.rank
        values = {f.name: getattr(profile, f.name) for f in dataclasses.fields(cls) if hasattr(profile, f.name)}
        ranks = profile.rank_pattern if method in LOW_RANK else {}
        alphas = profile.alpha_pattern if method in LOW_RANK else {}
        values |= {
            "rank_pattern": ranks,
            "alpha_pattern": {name: profile.scaling * own for name, own in ranks.items()} | alphas,
            "profile": profile.name,
            "task": task,
            "method": method,
            "rank": rank,
            "alpha": profile.scaling * rank if isinstance(rank, int) else None,
            "seed": seed,
            "learning_rate": profile.learning_rate[method][task] if learning_rate is None else learning_rate,
            "steps": profile.steps[task] if steps is None else steps,
            "split": split,
            "variant": variant,
            "base_sha256": base_sha256(profile.base_model, profile.revision, profile.tokenizer),
            "data_sha256": data_sha256(profile.data, task),
        }
        try:
            spec = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise ValueError(f"{explain(error)}: correct it") from error
        _ = spec.adapter_config  # what cannot be attached is told now, not when the base is loaded
        return spec

    @property
    def run_id(self) -> str:
        """`<task>-<method>[-<variant>][-r<rank>]-s<seed>-<ten hex digits>`."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("profile", "variant")}
        for local in ("base_model", "data", "tokenizer"):  # their hashes say what they are; a path says only where
            del values[local]
        for field in dataclasses.fields(self):
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if default is not dataclasses.MISSING and values.get(field.name) == default:
                values.pop(field.name, None)
        for name, value in values.items():
            if isinstance(value, dict):  # of a pattern the first key that matches counts: the order is part of it
                values[name] = list(value.items())
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        rank = "" if self.rank is None else f"-r{self.rank}"
        variant = "" if self.variant is None else f"-{self.variant}"
        return f"{self.task}-{self.method}{variant}{rank}-s{self.seed}-{digest}"


def spec_from_notebook(namespace: dict[str, Any]) -> tuple[RunSpec, Path]:
    """(spec, runs folder) from a notebook's variables right after its parameters cells.

    Papermill only warns of a parameter that the notebook does not have; here every public name that is not a parameter
    is an error, and so is a value of another type.
    """
    ipython = {"In", "Out", "get_ipython", "exit", "quit", "open"}
    for name in namespace:
        if not name.startswith("_") and name not in ipython and name not in PARAMETERS:
            near = difflib.get_close_matches(name, PARAMETERS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PARAMETERS)}"
            raise ValueError(f"unknown parameter {name!r}: {hint}")
    values = {}
    for name, kind in PARAMETERS.items():
        value = namespace.get(name)
        if value is None or value == "":
            continue
        integral = kind is int and isinstance(value, int) and not isinstance(value, bool)
        real = kind is float and isinstance(value, int | float) and not isinstance(value, bool)
        if not (integral or real or (kind is str and isinstance(value, str))):
            words = {str: "a text", int: "an integer", float: "a number"}
            raise ValueError(f"parameter {name!r} must be {words[kind]}, got {value!r}")
        values[name] = value
    for name in ("profile", "task", "method"):
        if name not in values:
            raise ValueError(f"parameter {name!r} is missing: give all of profile, task and method")
    runs_dir = Path(values.pop("runs_dir", PROJECT / "runs"))
    return RunSpec.from_profile(load_profile(values.pop("profile")), **values), runs_dir
