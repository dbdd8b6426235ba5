"""Claims tested on the report's own runs: its raw WinoGrande outputs, and what its printed accuracies can show."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dora_lab.claims.ledger import NotHere, Outcome, verdict_by, verdict_of
from dora_lab.claims.quotes import reported
from dora_lab.comparisons import Pairs, count_pairs, within
from dora_lab.data import load_examples
from dora_lab.fetch import FILES, git_blob_id, llm_adapters_folder, repository_path
from dora_lab.report_outputs import compare, first_match, read_outputs, right_by_id, stated_answer, unread_ids
from dora_lab.report_recipe import CUTOFF, answers_lost, border, load_tokenizer, token_counts
from dora_lab.statistics import in_points, wilson_interval, wording
from dora_lab.tables import METHOD_NAMES, PAPER, TASK_NAMES, published_accuracy, read_published
from dora_lab.tasks import Example, task


def printed_from_outputs(claimed: Mapping[str, Any]) -> Outcome:
    """The report's WinoGrande row, computed again from its outputs with its own parser."""
    equal, parts = [], []
    for method, outputs in _outputs().items():
        right = right_by_id(outputs, first_match)
        accuracy, printed = 100 * sum(right.values()) / len(right), reported("Our", method)["winogrande"]
        equal.append(round(accuracy, 1) == printed)
        parts.append(f"{METHOD_NAMES[method]} {accuracy:.2f}, printed {printed}")
    return Outcome(verdict_of(equal), "; ".join(parts), f"the report's {len(right):,} raw outputs each, first match")


def ahead_on_winogrande(claimed: Mapping[str, Any]) -> Outcome:
    """DoRA's lead in all questions, and in those where both outputs hold an answer, with both ways of reading."""
    outputs, said, parts = _outputs(), [], []
    for name, parser in (("first match", first_match), ("stated answer", stated_answer)):
        for answered in (False, True):
            pairs, _ = compare(outputs["dora"], outputs["lora"], parser, answered)
            found = pairs.interval()
            said.append(wording(found))
            which = f"{pairs.n:,} answered by both" if answered else f"all {pairs.n:,}"
            counted = f"{pairs.first_only} against {pairs.second_only}, p {pairs.p_value:.2g}"
            parts.append(f"{name}, {which}: {in_points(found)} points, {counted}")
    verdict = verdict_by(said, "ahead", "behind")
    return Outcome(verdict, "; ".join(parts), "the report's raw outputs, one run each, exact McNemar")


def unread_answers(claimed: Mapping[str, Any]) -> Outcome:
    """Whether both adapters answer in a form that can be read, equally often: exact McNemar, and within a margin."""
    unread = {}
    for method, outputs in _outputs().items():
        none = unread_ids(outputs, first_match)
        unread[method] = {i: i in none for i in right_by_id(outputs, first_match)}
    pairs = count_pairs(unread["dora"], unread["lora"])
    same = within(pairs.interval(0.90), claimed["within_points"] / 100)
    verdict = "holds" if same else "does not hold" if pairs.p_value < claimed["level"] else "depends"
    counts = [
        f"{METHOD_NAMES[m]} {sum(own.values())} ({100 * sum(own.values()) / len(own):.1f} %)"
        for m, own in unread.items()
    ]
    number = f"without any answer: {', '.join(counts)}, p {pairs.p_value:.2g}"
    return Outcome(verdict, number, f"the report's {pairs.n:,} raw outputs each, exact McNemar")


def ahead_by_counts(claimed: Mapping[str, Any]) -> Outcome:
    """For printed accuracies without outputs: at which shares of discordant questions McNemar's p is below 5 %.

    The share lies between the difference itself and the sum of both error rates. A lead never makes the claim hold: how
    many outputs could not be read is not known, and on WinoGrande that decides what is left of a clear lead.
    """
    name, n = claimed["task"], claimed["questions"]
    lora, dora = (reported("Our", method)[name] / 100 for method in ("lora", "dora"))
    net = round(n * abs(dora - lora))
    most = min(2 - lora - dora, lora + dora)
    shares = np.linspace(net / n, most, 200)
    found = [_p_value(n, net, share) < 0.05 for share in shares]
    reached = shares[found][-1] if any(found) else math.nan
    verdict = "does not hold" if dora < lora and all(found) else "depends"
    span = f"significant up to {100 * reached:.0f} % discordant, possible are {100 * most:.0f} %"
    number = f"{100 * (dora - lora):+.1f} points; {span}"
    return Outcome(verdict, number, f"printed accuracies, {n:,} questions, one run each; unread answers not known")


def full_data_explains(claimed: Mapping[str, Any]) -> Outcome:
    """Whether the report's WinoGrande falls short of the paper's once unread answers are set aside.

    That no shortfall is left to explain is shown where even the upper limit of it is within the margin.
    """
    reached, parts = [], []
    for method, outputs in _outputs().items():
        unread = unread_ids(outputs, first_match)
        right = [ok for i, ok in right_by_id(outputs, first_match).items() if i not in unread]
        limits = wilson_interval(sum(right), len(right))
        paper = published_accuracy(read_published(), PAPER, "Table 1", method)[0]["winogrande"]
        reached.append(paper - 100 * limits.low <= claimed["within_points"])
        span = f"{100 * limits.estimate:.1f} ({100 * limits.low:.1f} to {100 * limits.high:.1f})"
        parts.append(f"{METHOD_NAMES[method]} {span} of {len(right):,}, paper {paper}")
    verdict = "does not hold" if all(reached) else "depends"
    measured = "the report's raw WinoGrande outputs that can be read, no random part of all; Wilson's intervals"
    return Outcome(verdict, "; ".join(parts), measured)


def full_data_explains_hellaswag(claimed: Mapping[str, Any]) -> Outcome:
    """What is short of the paper, and the share of training prompts without an answer: it explains a shortfall too.

    The two cannot be told apart without trainings of LLaMA-7B; without such prompts nothing at hand bears on the claim.
    """
    examples, source = _examples("hellaswag")
    lost = answers_lost(token_counts(_tokenizer(), examples))
    if not lost:
        raise NotHere("no prompt loses its answer: only training on one task and on all could tell, on a large GPU")
    published = read_published()
    short = [
        f"{METHOD_NAMES[m]} {published_accuracy(published, PAPER, 'Table 1', m)[0]['hellaswag'] - own:.1f}"
        for m in ("lora", "dora")
        for own in [reported("Our", m)["hellaswag"]]
    ]
    number = f"points short: {', '.join(short)}; prompts that lose their answer at {CUTOFF} tokens: {100 * lost:.1f} %"
    return Outcome("depends", number, f"printed accuracies; HellaSwag {source}")


def full_data_explains_boolq(claimed: Mapping[str, Any]) -> Outcome:
    """Needs what the report did not publish, and two trainings of LLaMA-7B."""
    raise NotHere("BoolQ's raw outputs are not published; training on one task and on all needs a large GPU")


def answers_in_training(claimed: Mapping[str, Any]) -> Outcome:
    """Share of each task's prompts that lose their answer at the recipe's cut-off."""
    tokenizer, lost, sources = _tokenizer(), {}, []
    for name in claimed["tasks"]:
        examples, source = _examples(name)
        lost[name] = answers_lost(token_counts(tokenizer, examples))
        sources.append(f"{TASK_NAMES[name]} {source}")
    parts = [f"{TASK_NAMES[name]} {100 * share:.1f} %" for name, share in lost.items()]
    return Outcome(
        verdict_of(share == 0 for share in lost.values()),
        f"lost at {CUTOFF} tokens: {', '.join(parts)}",
        "; ".join(sources),
    )


def same_border(claimed: Mapping[str, Any]) -> Outcome:
    """Whether evaluation ends the prompt with the tokens that training has there."""
    tokenizer = _tokenizer()
    examples, source = _examples("winogrande")
    found = [border(tokenizer, example) for example in examples]
    same = sum(one.same for one in found)
    spaces = [
        [len(token) for token in tokens if not token.strip("▁")] for tokens in (found[0].training, found[0].evaluation)
    ]
    verdict = "holds" if same == len(found) else "does not hold"
    number = f"{same} of {len(found):,} prompts; the last token is {spaces[1][-1]} spaces, in training {spaces[0][-1]}"
    return Outcome(verdict, number, f"LLaMA's SentencePiece tokens, WinoGrande {source}")


def _p_value(n: int, net: int, share: float) -> float:
    discordant = max(net, round(n * share))
    second = (discordant - net) // 2
    return Pairs(0, second + net, second, n - 2 * second - net).p_value


def _outputs() -> dict[str, list]:
    try:
        return {method: read_outputs(method) for method in ("lora", "dora")}
    except (OSError, ValueError) as missing:  # not here, or another file than the pinned one
        raise NotHere(str(missing)) from missing


def _tokenizer() -> Any:
    try:
        return load_tokenizer()
    except FileNotFoundError as missing:
        raise NotHere(str(missing)) from missing


def _examples(name: str) -> tuple[list[Example], str]:
    """A task's test questions from the cache, and what they are: the pinned file, or another copy."""
    path = llm_adapters_folder() / repository_path(task(name), "test")
    if not path.is_file():
        raise NotHere(f"{path} is not here: `dora-lab fetch {name}`, or put LLM-Adapters' file there")
    pinned = git_blob_id(path) == FILES[repository_path(task(name), "test")].blob
    examples = load_examples(str(llm_adapters_folder() / "dataset"), name, "test")
    kind = "test file" if pinned else "questions of another copy than the pinned file"
    return examples, f"{len(examples):,} {kind}" if not pinned else f"{kind}, {len(examples):,} questions"
