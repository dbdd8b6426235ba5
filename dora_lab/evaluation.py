"""Likelihood scoring: which candidate answer does the model find most likely after the prompt?

All candidates of a question that differ in one token only are scored from one forward pass of what they share.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dora_lab.data import shortened
from dora_lab.models import answer_logits
from dora_lab.tasks import ANSWER_PREFIX, Example, prompt


@dataclass(frozen=True)
class Prediction:
    """One scored question. `log_likelihoods`: candidate -> sum of log p over the tokens that are its own."""

    id: str
    gold: str
    prediction: str
    log_likelihoods: dict[str, float]
    parsed: bool = True


@dataclass(frozen=True)
class _Row:
    """One sequence to run: log p of the candidates' own tokens is read off from its position `start - 1` on."""

    example: int
    ids: list[int]
    start: int
    own: dict[str, list[int]]  # candidate -> the tokens it does not share with the others


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
    Raises ValueError if a score is not a finite number.
    """
    was_training = model.training
    model.eval()
    rows = [
        row for i, example in enumerate(examples) for row in _rows(tokenizer, i, example, template, _positions(model))
    ]
    rows.sort(key=lambda row: len(row.ids))
    scores: list[dict[str, float]] = [{} for _ in examples]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        for row, log_p in zip(batch, _log_probabilities(model, batch), strict=True):
            for candidate, own in row.own.items():
                log_likelihood = log_p[range(len(own)), own].sum().item()
                if not math.isfinite(log_likelihood):
                    raise ValueError(
                        f"{examples[row.example].id}: log-likelihood of {candidate!r} is {log_likelihood}: "
                        "the weights have overflowed; lower the learning rate or take dtype float32"
                    )
                scores[row.example][candidate] = log_likelihood
    model.train(was_training)
    return [
        Prediction(e.id, e.answer, max(e.candidates, key=s.__getitem__), {c: s[c] for c in e.candidates})
        for e, s in zip(examples, scores, strict=True)
    ]


def _positions(model: PreTrainedModel) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1_000_000


def _rows(tokenizer, index: int, example: Example, template: str, limit: int) -> list[_Row]:
    text = prompt(example, template) + ANSWER_PREFIX
    encoded = tokenizer([text + candidate for candidate in example.candidates])["input_ids"]
    encoded = [shortened(ids, limit, tokenizer.bos_token_id) for ids in encoded]
    start = 0  # tokens that all candidates share, always fewer than the shortest has
    while len({ids[start] for ids in encoded}) == 1 and start < min(map(len, encoded)) - 1:
        start += 1
    own = {c: ids[start:] for c, ids in zip(example.candidates, encoded, strict=True)}
    if all(len(tokens) == 1 for tokens in own.values()):
        return [_Row(index, encoded[0][:start], start, own)]
    return [_Row(index, encoded[i][:-1], start, {c: own[c]}) for i, c in enumerate(example.candidates)]


def _log_probabilities(model: PreTrainedModel, batch: list[_Row]) -> list[Tensor]:
    """For each row log p of the token after each position from `start - 1` on: (own tokens, vocabulary), float32."""
    longest = max(len(row.ids) for row in batch)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in batch])  # (rows, longest)
    where = [(i, column) for i, row in enumerate(batch) for column in range(row.start - 1, len(row.ids))]
    rows, columns = torch.tensor(where).T
    device = model.device
    logits = answer_logits(model, ids.to(device), rows.to(device), columns.to(device)).cpu()  # (positions, vocabulary)
    return list(logits.log_softmax(-1).split([len(row.ids) - row.start + 1 for row in batch]))
