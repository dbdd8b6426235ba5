"""The study of ranks: every criterion at every budget, allocated once for a base and written as a profile's variants.

The measured criteria read training data alone, of all tasks of the profile together, so that one allocation serves
them all; no question of a validation or test split decides anything.
"""

import math
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence

import yaml
from torch import Tensor

from dora_lab.data import load_examples, tokenized
from dora_lab.kernels import features_of
from dora_lab.models import load_base
from dora_lab.probes import target_linears
from dora_lab.profiles import Profile
from dora_lab.ranks import CONTROLS, CRITERIA, MEASURES, RankAllocation, allocate_ranks, uniform_budget
from dora_lab.trainer import collate

CONTROLLED = "update_spectrum"  # the criterion whose ranks the controls deal anew
BATCHES = 8  # for gradients and inputs
UPDATE_STEPS = 60  # of the short training at full rank
Allocations = Mapping[tuple[str, int], RankAllocation]  # (criterion, rank of the uniform budget) -> ranks


def training_batches(profile: Profile, tokenizer, count: int) -> list[dict[str, Tensor]]:
    """`count` batches of training examples of all the profile's tasks, shuffled together from the seed 0."""
    rows = []
    for task in profile.tasks:
        examples = load_examples(profile.data, task, "train", profile.train_examples, profile.validation_examples)
        cutoff = None if profile.cutoff_tokens == "auto" else profile.cutoff_tokens
        rows += tokenized(
            tokenizer, examples, profile.prompt, profile.append_eos, cutoff, profile.train_on_prompt, profile.cut
        )[0].to_list()
    random.Random(0).shuffle(rows)
    size = profile.batch_size
    if count * size > len(rows):
        raise ValueError(f"{count} batches of {size} need {count * size} training examples, there are {len(rows)}")
    return [collate(rows[start : start + size]) for start in range(0, count * size, size)]


def measure(profile: Profile, model, tokenizer, criteria: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """{criterion: {module: singular values}} of those of `criteria` that are measured on training data."""
    batches = training_batches(profile, tokenizer, UPDATE_STEPS if CONTROLLED in criteria else BATCHES)
    found = {}
    for criterion in MEASURES.keys() & set(criteria):
        own = {}
        if criterion == "update_spectrum" and "full" in profile.learning_rate:
            own = {"learning_rate": min(profile.learning_rate["full"][task] for task in profile.tasks)}
        own_batches = batches if criterion == "update_spectrum" else batches[:BATCHES]
        found[criterion] = MEASURES[criterion](model, own_batches, profile.target_modules, **own)
    return found


def allocate_all(
    profile: Profile,
    ranks: Sequence[int],
    method: str = "dora",
    criteria: Sequence[str] = CRITERIA,
    report: Callable[[str], None] = print,
) -> dict[tuple[str, int], RankAllocation]:
    """Every criterion at the budget of every uniform rank; the controls are of `CONTROLLED`'s ranks.

    Raises ValueError for controls without what they control, or what `allocate_ranks` and loading raise.
    """
    if set(CONTROLS) & set(criteria) and CONTROLLED not in criteria:
        raise ValueError(f"{' and '.join(CONTROLS)} deal the ranks of {CONTROLLED} anew: allocate that as well")
    model, tokenizer = load_base(
        profile.base_model, profile.dtype, revision=profile.revision, tokenizer=profile.tokenizer
    )
    shapes = {name: features_of(linear) for name, linear in target_linears(model, profile.target_modules).items()}
    spectra = measure(profile, model, tokenizer, criteria)
    shared = {"method": method, "target_modules": profile.target_modules, "scaling": profile.scaling}
    found: dict[tuple[str, int], RankAllocation] = {}
    for rank in ranks:
        budget = uniform_budget(shapes, rank, method)
        for criterion in sorted(criteria, key=CRITERIA.index):
            of = found.get((CONTROLLED, rank))
            own = allocate_ranks(model, budget, criterion, **shared, spectra=spectra.get(criterion), of=of)
            found[criterion, rank] = own
            values = own.rank_pattern.values()
            report(
                f"{criterion} at the budget of rank {rank}: {own.trainable_parameters} of {budget} parameters, "
                f"ranks {min(values)} to {max(values)}"
            )
    return found


def variant_name(criterion: str, rank: int) -> str:
    """What the variant of a criterion at the budget of a uniform rank is called."""
    return f"{criterion.replace('_', '-')}-{rank}"


def criterion_of(spec) -> tuple[str, int] | None:
    """(criterion, rank of its budget) of a run of such a profile; plain runs are uniform. None for other variants."""
    if spec.variant is None:
        return "uniform", spec.rank
    return next(((c, spec.rank) for c in CRITERIA if variant_name(c, spec.rank) == spec.variant), None)


def is_uniform(allocation: RankAllocation) -> bool:
    """Whether every module has the same rank: such an allocation's runs are the uniform ones, whatever criterion."""
    return len(set(allocation.rank_pattern.values())) == 1


def profile_text(name: str, extends: str, profile: Profile, method: str, allocations: Allocations) -> str:
    """A profile with a variant for every allocation, as YAML that `load_profile` reads.

    extends: the name or path of `profile`, whose tasks and rank these are.

    Uniform ranks have no pattern, so that their runs are those of the profile that is extended; at its own rank they
    are the plain runs. A criterion that allots uniform ranks has no variant.
    """
    names = {"extends": extends, "name": name}
    lines = [
        "# Made by `dora-lab allocate`, from the base's weights and training data alone. See dora_lab/rank_study.py.",
        # quoted where YAML would read a number or a date
        *yaml.safe_dump(names, sort_keys=False, allow_unicode=True, width=math.inf).splitlines(),
        f"summary: ranks by criterion at equal trainable parameters, with controls; {', '.join(profile.tasks)}",
        f"tasks: [{', '.join(profile.tasks)}]",
        f"methods: [{method}]",
        "variants:",
    ]
    for (criterion, rank), own in allocations.items():
        if criterion == "uniform":
            lines += [f"  {variant_name(criterion, rank)}: {{rank: {rank}}}"] if rank != profile.rank else []
        elif is_uniform(own):
            lines.append(f"  # {variant_name(criterion, rank)}: the uniform ranks")
        else:
            pattern = ", ".join(f"{module}: {value}" for module, value in own.rank_pattern.items())
            lines += [
                f"  {variant_name(criterion, rank)}:  # {own.trainable_parameters} of {own.budget} parameters",
                f"    rank: {rank}",
                "    rank_pattern: {",
                *textwrap.wrap(pattern, 116, initial_indent="      ", subsequent_indent="      "),
                "    }",
            ]
    return "\n".join(lines) + "\n"
