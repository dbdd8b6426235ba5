"""A profile: the checked YAML file of run parameters that a run, a grid and papermill are given.

The files are `data/profiles/<name>.yaml`; a path to another YAML file works as well.
"""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from dora_lab import tasks as known_tasks

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "data" / "profiles"
VALIDATION_EXAMPLES = 300  # held back from a train file where a profile does not say how many
NAMED_DATA = ("mini-world", "llm-adapters")  # what `data` may be besides a folder

VARIANT_NAME = re.compile("[a-z0-9]+(-[a-z0-9]+)*")
# What the runs of a grid share, so that no variant changes it.
OF_THE_GRID = frozenset({"name", "summary", "tasks", "methods", "seeds", "sweep_seeds", "learning_rate_grid"})
OF_THE_GRID |= {"jobs", "variants"}

Method = Literal["full", "lora", "dora", "dora-magnitude"]
ModuleMethod = Literal["lora", "dora", "dora-magnitude", "frozen"]
Initialisation = Literal["kaiming", "pissa"]  # of A and B
Quantisation = Literal["none", "int8", "nf4", "nf4-double"]  # of the frozen base's linear layers
Template = Literal["alpaca", "alpaca-short", "alpaca-short-other-end", "alpaca-indented"]
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw"]
Positive = Annotated[int, Field(ge=1, strict=True)]  # strict: no true, no 1.0
Natural = Annotated[int, Field(ge=0, strict=True)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Some = Field(min_length=1)  # a grid or a sweep of none would have no run to speak of


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Profile:
    """Everything that a grid of runs has in common; `steps` and `learning_rate` are given per task.

    `alpha = scaling * rank`. `data` and `base_model` are "mini-world" or a folder (relative ones start at the profile's
    own file, in a variant too; write `./name` for a base model, which may be a hub id as well). `data` may be
    "llm-adapters" too: the real files, fetched and verified. `evaluation`: "likelihood" scores the candidates,
    "generate" is the paper's way. `prompt`: "alpaca" is LLM-Adapters' full preamble, "alpaca-short" keeps its two
    headings only, "alpaca-indented" is the report's.

    base_model may be `random:<shape>` too (`dora_lab.shapes`): random weights, with the `tokenizer` of another base or
    folder. revision: commit of a hub id. A step reads `batch_size * gradient_accumulation` examples, `micro_batch_size`
    of them at a time where it is given. cutoff_tokens "auto": the longest prompt with its answer; cut: what one that is
    longer loses, the beginning of its "prompt" or its "end", answer included. jobs: runs at a time, for the grid.
    answers_cut: share of the training examples that end where their answer begins. evaluation_prompt: the one that is
    asked with, if not `prompt`. best_of_checkpoints: validation examples on whose loss the best checkpoint is chosen,
    which then is the run's; None takes the last state.

    method_pattern ({end of a module's name: its own method}), initialisation: as in `adapter_config.AdapterConfig`.

    rank_pattern, alpha_pattern: ranks and alphas of single modules, as in `AdapterConfig`; beside a rank
    without an alpha, alpha is `scaling * rank`.

    variants: name -> values that differ from the profile's own (`variant`). The grid is the plain runs and those of
    every variant.

    processes: that share one run, each with a GPU of its own where there are any; sharding: what each of them keeps,
    the whole base under "ddp", a part of it under "fsdp". They are no part of a run's identity: the same examples are
    read in the same steps, and the record says how many processes there were.
    """

    name: str
    summary: str
    base_model: str
    data: str
    tasks: Annotated[list[str], Some]
    methods: Annotated[list[Method], Some]
    seeds: Annotated[list[Natural], Some]
    rank: Positive
    scaling: Annotated[float, Field(gt=0)]
    target_modules: list[str]
    prompt: Template
    append_eos: bool
    cutoff_tokens: Positive | Literal["auto"]
    steps: dict[str, Positive]
    batch_size: Positive
    warmup_steps: Natural
    learning_rate: dict[Method, dict[str, Rate]]
    learning_rate_grid: Annotated[list[Rate], Some]
    sweep_seeds: Annotated[list[Natural], Some]
    evaluation_batch_size: Positive
    gradient_accumulation: Positive = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    train_examples: Positive | None = None
    validation_examples: Positive | None = None
    test_examples: Positive | None = None
    checkpoints: Positive = 4
    geometry: bool = True
    threads: Positive = 1
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
    answers_cut: Annotated[float, Field(ge=0, lt=1)] = 0.0
    evaluation_prompt: Template | None = None
    best_of_checkpoints: Positive | None = None
    jobs: Positive | None = None
    method_pattern: dict[str, ModuleMethod] = Field(default_factory=dict)
    initialisation: Initialisation = "kaiming"
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    processes: Positive = 1
    sharding: Literal["ddp", "fsdp"] = "ddp"
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _tasks_are_known(self):
        for name in (*self.tasks, *self.steps):
            known_tasks.task(name)
        missing = [name for name in self.tasks if name not in self.steps]
        if missing:
            raise ValueError(f"steps has no entry for the task(s) {', '.join(missing)}")
        check_micro_batch(self.batch_size * self.gradient_accumulation, self.micro_batch_size)
        check_shared(self.micro_batch_size or self.batch_size, self.processes)
        if (self.cut == "end" or self.answers_cut) and not self.train_on_prompt:
            what = "cut 'end'" if self.cut == "end" else "answers_cut"
            raise ValueError(f"{what} can leave an example without its answer: it needs train_on_prompt true")
        if self.best_of_checkpoints and self.best_of_checkpoints > (self.validation_examples or VALIDATION_EXAMPLES):
            raise ValueError(f"best_of_checkpoints {self.best_of_checkpoints}: there are fewer validation_examples")
        for name in self.variants:
            if not VARIANT_NAME.fullmatch(name):
                raise ValueError(f"variant {name!r}: a name is made of small letters, digits and single hyphens")
            self.variant(name)
        return self

    def variant(self, name: str | None) -> "Profile":
        """The profile with one variant's values in place of its own; itself for None.

        Raises ValueError for an unknown variant, or one that sets what is not a run's or has a wrong value.
        """
        if name is None:
            return self
        if name not in self.variants:
            known = ", ".join(self.variants) or "none"
            raise ValueError(f"profile {self.name!r} has no variant {name!r}: its variants are {known}")
        values = self.variants[name]
        kept = sorted(OF_THE_GRID & set(values))
        if kept:
            raise ValueError(f"variant {name!r} cannot change {', '.join(kept)}, which belong to the whole grid")
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        try:
            return TypeAdapter(Profile).validate_python(_over(own, values) | {"variants": {}})
        except ValidationError as error:
            raise ValueError(f"variant {name!r}: {explain(error)}") from error


def check_micro_batch(effective: int, micro: int | None) -> None:
    """Raise ValueError if a step's `effective` examples cannot be read `micro` at a time."""
    if micro and effective % micro:
        raise ValueError(f"micro_batch_size {micro} does not divide the {effective} examples of a step: take a divisor")


def check_shared(micro: int, processes: int) -> None:
    """Raise ValueError if `processes` cannot each read the same part of `micro` examples."""
    if micro % processes:
        raise ValueError(
            f"{processes} processes cannot share micro-batches of {micro}: set micro_batch_size to a multiple of their "
            "number"
        )


def known_profiles() -> list[str]:
    """Names of the profiles that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Read and check a profile, by its name or by the path of a YAML file.

    Raises ValueError: no such profile, not YAML, a key that is missing, unknown or has a wrong value, profiles that
    extend each other.
    """
    return _load_chain(name_or_path)[0]


def extended_profiles(name_or_path: str | Path) -> list[Profile]:
    """The profiles that this one extends, the nearest first; none for most. Raises what `load_profile` raises."""
    return _load_chain(name_or_path)[1:]


def _load_chain(name_or_path: str | Path, above: tuple[Path, ...] = ()) -> list[Profile]:
    """The profile and those that it extends, the nearest first. above: the files that were read on the way to it."""
    path = Path(name_or_path) if str(name_or_path).endswith((".yaml", ".yml")) else FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(
            f"unknown profile {str(name_or_path)!r}: choose one of {', '.join(known_profiles())}, "
            "or give the path of a .yaml file"
        )
    files = (*above, path.resolve())
    if path.resolve() in above:
        circle = " -> ".join(map(str, files[above.index(path.resolve()) :]))
        raise ValueError(f"profiles extend each other in a circle: {circle}; take one `extends` out")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}; correct the file") from error
    under = []
    if isinstance(values, dict) and "extends" in values:
        base = values.pop("extends")
        under = _load_chain(_beside(path, base) if str(base).endswith((".yaml", ".yml")) else base, files)
        own = {field.name: getattr(under[0], field.name) for field in fields(Profile)}
        values = _over(own | {"variants": {}}, values)
    try:
        profile = TypeAdapter(Profile).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}; correct the file") from error
    variants = {name: own | _resolved(path, own) for name, own in profile.variants.items()}
    places = {key: getattr(profile, key) for key in ("base_model", "tokenizer", "data")}
    return [replace(profile, variants=variants, **_resolved(path, places)), *under]


def _resolved(path: Path, values: dict) -> dict[str, str]:
    """The folders among a profile's or a variant's values, relative to the profile's own file."""
    found = {key: values.get(key) for key in ("base_model", "tokenizer")}
    found = {key: name for key, name in found.items() if name and name.startswith((".", "~"))}
    if values.get("data", NAMED_DATA[0]) not in NAMED_DATA:
        found["data"] = values["data"]
    return {key: _beside(path, name) for key, name in found.items()}


def _over(values: dict, own: dict) -> dict:
    """`own` in place of `values`; a mapping in both adds to the one that is there."""
    both = {key: _over(values[key], new) for key, new in own.items() if _are_mappings(values.get(key), new)}
    return values | own | both


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _beside(profile_path: Path, folder: str) -> str:
    """A folder as a profile names it, relative to the profile's own file."""
    return str((profile_path.resolve().parent / Path(folder).expanduser()).resolve())


def explain(error: ValidationError) -> str:
    """What pydantic found wrong, in one line: key, what is wrong, the value that was given."""
    lines = []
    for item in error.errors():
        key = "".join(f"{part}: " for part in [".".join(map(str, item["loc"]))] if part)
        whole = not key or item["type"] in ("missing", "unexpected_keyword_argument")
        given = "" if whole else f", got {item['input']!r:.80}"
        lines.append(key + item["msg"].removeprefix("Value error, ") + given)
    return "; ".join(lines)
