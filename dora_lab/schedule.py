"""How long a profile's runs take: their tokens and operations, and from measured tokens a second the hours.

Tokens are those that a step reads, padding included. Operations are multiplications and additions, two for each
number of a weight and token; a frozen base has a forward, a second one under checkpointing, and the gradient of what it
reads, but none of its weights. Scoring the test questions is not counted: it is one forward of each.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from dora_lab.adapters import LLAMA_TARGETS
from dora_lab.data import LLM_ADAPTERS, load_examples, tokenized
from dora_lab.fetch import llm_adapters_folder, repository_path
from dora_lab.job import Job
from dora_lab.models import load_tokenizer
from dora_lab.profiles import Profile
from dora_lab.shapes import SHAPES, Shape
from dora_lab.specs import RunSpec
from dora_lab.tasks import task
from dora_lab.trainer import order

A100_BF16 = 312e12  # operations a second: NVIDIA's data sheet of the A100, dense bfloat16
ANSWER = 8  # labelled tokens of an example, about: "the correct answer is", the answer's own, and the end
# Tokens that a step of `llama-7b` reads for each example, from the LLM-Adapters files that were at hand, with LLaMA's
# tokenizer: BoolQ's train file; of WinoGrande the test file; of HellaSwag the validation set without its markers.
RECORDED_TOKENS = {"boolq": 74.4, "hellaswag": 279.0, "winogrande": 103.3}


@dataclass(frozen=True)
class Planned:
    """One run. `lengths`: "this cache", or "recorded" where the data or the tokenizer is not here."""

    task: str
    method: str
    steps: int
    tokens: int
    operations: float
    lengths: str


def planned_runs(profile: Profile, shape: Shape = SHAPES["llama-7b"]) -> list[Planned]:
    """The runs of a profile with its first seed. Raises ValueError for a task whose lengths are not known."""
    found = []
    for name in profile.tasks:
        per_example, lengths = _tokens_per_example(profile, name)
        for method in profile.methods:
            tokens = round(profile.steps[name] * profile.batch_size * profile.gradient_accumulation * per_example)
            job = Job(
                shape,
                method,
                profile.rank,
                length=max(ANSWER, round(per_example)),
                target_modules=tuple(profile.target_modules) or LLAMA_TARGETS,
                checkpointing=profile.gradient_checkpointing,
                logit_columns=None if profile.train_on_prompt else ANSWER,
            )
            found.append(
                Planned(name, method, profile.steps[name], tokens, tokens * operations_per_token(job), lengths)
            )
    return found


def operations_per_token(job: Job) -> float:
    """Operations of a training step for each token of its sequences, with adapters; norms and elementwise left out."""
    shape, again = job.shape, int(job.checkpointing)
    base = 2 * shape.layers * sum(out * inp for out, inp in shape.linears.values()) * (2 + again)
    low_rank = 2 * shape.layers * sum(job.rank * (out + inp) for out, inp in job.targets.values()) * (3 + again)
    seen = (job.length + 1) / 2  # tokens that one attends to, on average
    attention = 4 * shape.layers * seen * shape.heads * shape.head_dim * (3 + again)
    output = 2 * shape.hidden * shape.vocabulary * 2 * (job.logit_columns or job.length) / job.length
    return base + low_rank + attention + output


def needed_tokens_per_s(runs: list[Planned], hours: float) -> float:
    """Tokens a second at which the runs, one after another, take so many hours."""
    return sum(run.tokens for run in runs) / (3600 * hours)


def needed_share(runs: list[Planned], hours: float, peak: float = A100_BF16) -> float:
    """Operations a second that this takes, as a share of what a GPU can do at most."""
    return sum(run.operations for run in runs) / (3600 * hours * peak)


def read_measurements(folder: Path) -> list[dict]:
    """What `dora-lab measure-7b` has written into a folder, by file name; each with its `file`.

    Raises ValueError naming a file that is broken or of another kind.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        advice = f"delete it, or measure again with `dora-lab measure-7b {path}`"
        try:
            measured = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is broken JSON ({error}): {advice}") from None
        if not isinstance(measured, dict) or not {"environment", "workload", "rows"} <= set(measured):
            raise ValueError(f"{path} is no measurement of `dora-lab measure-7b`: {advice}")
        found.append(measured | {"file": path.name})
    return found


def hours(runs: list[Planned], measured: dict) -> list[float | None]:
    """Hours of each run at the tokens a second of its method in one measurement; None where that is not measured."""
    speeds = {row["variant"]: row["tokens_per_s"] for row in measured["rows"] if "tokens_per_s" in row}
    return [run.tokens / speeds[run.method] / 3600 if run.method in speeds else None for run in runs]


def _tokens_per_example(profile: Profile, name: str) -> tuple[float, str]:
    file = llm_adapters_folder() / repository_path(task(name), "train")
    if profile.data == LLM_ADAPTERS and file.is_file():
        try:
            tokenizer = load_tokenizer(profile.base_model, profile.revision, profile.tokenizer)
        except (OSError, ValueError):  # gated, or no network
            tokenizer = None
        if tokenizer is not None:
            return measured_tokens(profile, name, tokenizer), "this cache"
    if name not in RECORDED_TOKENS:
        raise ValueError(f"no lengths of {name} are recorded: fetch it with `dora-lab fetch {name}`")
    return RECORDED_TOKENS[name], "recorded"


def measured_tokens(profile: Profile, name: str, tokenizer, source: str | None = None, split: str = "train") -> float:
    """Tokens that a step reads for each of its examples, in the order in which a run reads them, padding included."""
    examples = load_examples(source or profile.data, name, split, profile.train_examples, profile.validation_examples)
    rows, _ = tokenized(tokenizer, examples, profile.prompt, profile.append_eos, None)
    lengths = [len(ids) for ids in rows["input_ids"]]
    spec = RunSpec.from_profile(profile, name, profile.methods[0])
    size = spec.micro_batch_size or spec.batch_size
    read = [lengths[i] for i in order(lengths, spec)]
    return sum(size * max(read[first : first + size]) for first in range(0, len(read), size)) / len(read)
