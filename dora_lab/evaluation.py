"""Two ways to ask a model for its answer, never mixed: `likelihood` scores the candidates, `generate` lets it write.

`likelihood`: which candidate does the model find most likely after the prompt? One forward pass a question: the prompt
once, then the candidates' own tokens as branches of it; what all prompts begin with is read once for all.
`generate`: LLM-Adapters' and the paper's protocol, a text of 32 tokens from 4 beams, in which the first answer word
counts.
"""

import copy
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dora_lab.data import shared_length, shortened
from dora_lab.models import answer_logits
from dora_lab.tasks import ANSWER_PREFIX, Example, parse_answer, prompt

BEAMS, NEW_TOKENS = 4, 32  # LLM-Adapters, commonsense_evaluate.py
PREFIX_TOKENS = 32  # a common beginning shorter than this is read again with every question


@dataclass(frozen=True)
class Prediction:
    """One answered question.

    `log_likelihoods`: candidate -> log p of its tokens after "the correct answer is ", in nats; empty if generated.
    `log_likelihoods_per_token`: the same divided by its number of tokens; None where every candidate has one token.
    `prediction`: the likeliest by the sum, or the word parsed from `text`, what was generated; "" if `parsed` is False.
    """

    id: str
    gold: str
    prediction: str
    log_likelihoods: dict[str, float]
    parsed: bool = True
    log_likelihoods_per_token: dict[str, float] | None = None
    text: str | None = None


def as_row(prediction: Prediction) -> dict:
    """A line of `predictions.jsonl`; what does not apply is left out."""
    return {name: value for name, value in asdict(prediction).items() if value is not None}


def accuracy(predictions: list[Prediction]) -> float:
    """Share of right answers; an unparsed one is wrong."""
    return sum(p.prediction == p.gold for p in predictions) / len(predictions)


def accuracy_by_task(predictions: list[Prediction]) -> dict[str, float]:
    """Accuracy of each task in a mixture's test questions, by the names in front of their ids."""
    groups = defaultdict(list)
    for p in predictions:
        groups[p.id.split("-")[0]].append(p)
    return {name: accuracy(group) for name, group in groups.items()}


def per_token(predictions: list[Prediction]) -> list[Prediction]:
    """The same scores, with the candidate predicted that is likeliest per token (arXiv 2005.14165, section 2.4)."""
    scores = [p.log_likelihoods_per_token or p.log_likelihoods for p in predictions]
    return [replace(p, prediction=max(s, key=s.__getitem__)) for p, s in zip(predictions, scores, strict=True)]


@torch.no_grad()
def likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    template: str,
    batch_size: int,
) -> list[Prediction]:
    """Score every candidate of every example after `prompt + "the correct answer is "`; keeps the order of `examples`.

    Rows are sorted by length and padded on the right. A prompt longer than the model's positions loses its beginning.
    Candidates of several tokens that differ before the last need an attention that takes a mask (eager or sdpa).
    Raises ValueError if a score is not a finite number.
    """
    was_training = model.training
    model.eval()
    rows = [_row(tokenizer, i, example, template, _positions(model)) for i, example in enumerate(examples)]
    rows.sort(key=lambda row: len(row.ids))
    scores: list[dict[str, float]] = [{} for _ in examples]
    prefix = _prefix(model, rows)
    for group in ([r for r in rows if not r.branched], [r for r in rows if r.branched]):
        for first in range(0, len(group), batch_size):
            batch = group[first : first + batch_size]
            for row, log_p in zip(batch, _log_probabilities(model, batch, prefix), strict=True):
                place = {column: i for i, column in enumerate(row.columns)}
                for candidate, reads in row.reads.items():
                    where, tokens = zip(*((place[column], token) for column, token in reads), strict=True)
                    log_likelihood = log_p[where, tokens].sum().item()
                    if not math.isfinite(log_likelihood):
                        raise ValueError(
                            f"{examples[row.example].id}: log-likelihood of {candidate!r} is {log_likelihood}: "
                            "the weights have overflowed; lower the learning rate or take dtype float32"
                        )
                    scores[row.example][candidate] = log_likelihood
    model.train(was_training)
    tokens = {row.example: {c: len(reads) for c, reads in row.reads.items()} for row in rows}
    return [_scored(example, s, tokens[i]) for i, (example, s) in enumerate(zip(examples, scores, strict=True))]


def _scored(example: Example, sums: dict[str, float], tokens: dict[str, int]) -> Prediction:
    normalised = {c: sums[c] / tokens[c] for c in example.candidates} if max(tokens.values()) > 1 else None
    return Prediction(
        example.id,
        example.answer,
        max(example.candidates, key=sums.__getitem__),
        {c: sums[c] for c in example.candidates},
        log_likelihoods_per_token=normalised,
    )


def _positions(model: PreTrainedModel) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1_000_000


@dataclass(frozen=True)
class _Row:
    """One question as one sequence: what its candidates share, then each candidate's own tokens but the last.

    Candidates that differ in their last token only add nothing: their tokens are read off after the shared part.
    """

    example: int
    ids: list[int]
    branches: list[int]  # of each token: 0 in the shared part, i in the i-th candidate's
    positions: list[int]  # of each token: every branch goes on from the shared part
    reads: dict[str, list[tuple[int, int]]]  # candidate -> (column, token whose log p is read there), token by token

    @property
    def branched(self) -> bool:
        return self.branches[-1] > 0

    @property
    def columns(self) -> list[int]:
        return sorted({column for reads in self.reads.values() for column, _ in reads})


def _row(tokenizer: PreTrainedTokenizerBase, index: int, example: Example, template: str, limit: int) -> _Row:
    text = prompt(example, template) + ANSWER_PREFIX
    alone, *whole = tokenizer([text, *(text + candidate for candidate in example.candidates)])["input_ids"]
    fork = 0  # tokens that all candidates share, always fewer than the shortest has
    while len({ids[fork] for ids in whole}) == 1 and fork < min(map(len, whole)) - 1:
        fork += 1
    start = min(fork, *(shared_length(alone, ids) for ids in whole))  # where the answer begins
    shared = shortened(whole[0][:fork], limit + fork - max(map(len, whole)), tokenizer.bos_token_id)
    common = [(len(shared) - fork + i - 1, whole[0][i]) for i in range(start, fork)]
    ids, branches, positions, reads = list(shared), [0] * len(shared), list(range(len(shared))), {}
    for number, (candidate, tokens) in enumerate(zip(example.candidates, whole, strict=True), 1):
        own = tokens[fork:]
        before = [len(shared) - 1, *range(len(ids), len(ids) + len(own) - 1)]  # column in front of each own token
        reads[candidate] = common + list(zip(before, own, strict=True))
        ids += own[:-1]
        branches += [number] * (len(own) - 1)
        positions += range(len(shared), len(shared) + len(own) - 1)
    return _Row(index, ids, branches, positions, reads)


def _prefix(model: PreTrainedModel, rows: list[_Row]) -> Cache | None:
    """Keys and values of what all rows begin with, for a batch of one; None if it is too short to be worth it.

    With LLaMA's tokenizer the template and a task's own first words are 40 to 45 tokens, most of a BoolQ prompt.
    """
    first = rows[0].ids
    length = min(min(shared_length(first, row.ids), row.columns[0]) for row in rows)
    if length < PREFIX_TOKENS or len(rows) == 1:
        return None
    ids = torch.tensor([first[:length]], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _log_probabilities(model: PreTrainedModel, batch: list[_Row], prefix: Cache | None) -> list[Tensor]:
    """For each row log p of the token after each of its `columns`: (columns, vocabulary), float32."""
    read = 0 if prefix is None else prefix.get_seq_length()  # tokens of every row
    longest = max(len(row.ids) for row in batch)
    where = [(i, column - read) for i, row in enumerate(batch) for column in row.columns]
    rows, columns = torch.tensor(where).T
    device = model.device
    packing = {}
    if batch[0].branched:
        branches, positions = (
            _padded([r.branches for r in batch], longest),
            _padded([r.positions for r in batch], longest),
        )
        packing = {
            "attention_mask": _branch_mask(branches, model.get_input_embeddings().weight.dtype)[:, :, read:].to(device),
            "position_ids": positions[:, read:].to(device),
        }
    if prefix is not None:
        packing["past_key_values"] = copy.deepcopy(prefix)  # the model appends to it
        packing["past_key_values"].batch_repeat_interleave(len(batch))
    ids = _padded([row.ids for row in batch], longest)[:, read:].to(device)  # (rows, longest - read)
    logits = answer_logits(model, ids, rows.to(device), columns.to(device), **packing).cpu()  # (positions, vocabulary)
    return list(logits.log_softmax(-1).split([len(row.columns) for row in batch]))


def _padded(rows: list[list[int]], longest: int) -> Tensor:
    """(rows, longest), zeros on the right."""
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def _branch_mask(branches: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token may see another, else the lowest number: (batch, 1, longest, longest) from (batch, longest).

    It sees the shared part in front of it and its own branch. Padding counts as shared; no one looks that far on.
    """
    longest = branches.shape[1]
    seen, sees = branches[:, None, None, :], branches[:, None, :, None]
    allowed = ((seen == 0) | (seen == sees)) & torch.ones(longest, longest, dtype=torch.bool).tril()
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    template: str,
    batch_size: int,
) -> list[Prediction]:
    """Let the model write after the prompt, and take the first answer word; keeps the order of `examples`.

    4 beams, 32 new tokens, no sampling. An answer without any answer word is not parsed and counts as wrong. Prompts
    are sorted by length and padded on the left, under a mask; one that leaves too few positions loses its beginning.
    """
    was_training = model.training
    model.eval()
    settings = GenerationConfig(
        num_beams=BEAMS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    limit = _positions(model) - NEW_TOKENS
    encoded = tokenizer([prompt(example, template) for example in examples])["input_ids"]
    prompts = [shortened(ids, limit, tokenizer.bos_token_id) for ids in encoded]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    texts = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        longest = len(prompts[batch[-1]])
        gaps = [longest - len(prompts[i]) for i in batch]
        ids = torch.tensor([[0] * gap + prompts[i] for gap, i in zip(gaps, batch, strict=True)])  # (batch, longest)
        mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])  # (batch, longest)
        written = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )[:, longest:]
        texts |= zip(batch, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True)
    model.train(was_training)
    return [_parsed(example, texts[i].strip()) for i, example in enumerate(examples)]


def _parsed(example: Example, text: str) -> Prediction:
    word = parse_answer(text, example)
    return Prediction(example.id, example.answer, word or "", {}, parsed=word is not None, text=text)


PROTOCOLS = {"likelihood": likelihood, "generate": generate}
