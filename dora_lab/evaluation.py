"""Likelihood scoring: which candidate answer does the model find most likely after the prompt?

All candidates of a question that differ in one token only are scored from one forward pass of what they share.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dora_lab.tasks import ANSWER_PREFIX, Example, prompt


@dataclass(frozen=True)
class Prediction:
    """The scored answer of one example. `log_likelihoods`: candidate -> sum of log p over the tokens that are its own."""

    id: str
    gold: str
    prediction: str
    log_likelihoods: dict[str, float]
    parsed: bool = True


@dataclass(frozen=True)
class _Row:
    """One sequence to run: the candidates' tokens are read off after `start` tokens."""

    example: int
    ids: list[int]
    start: int
    candidates: dict[str, list[int]]  # candidate -> its own tokens


@torch.no_grad()
def likelihood(model, tokenizer, examples: list[Example], template: str, batch_size: int) -> list[Prediction]:
    """Score every candidate of every example after `prompt + "the correct answer is "`.

    Rows are sorted by length and padded on the right without a mask: under causal attention no token sees what follows
    it. Only the positions that matter go through the output layer. The order of `examples` is kept.
    """
    was_training = model.training
    model.eval()
    rows = [row for i, example in enumerate(examples) for row in _rows(tokenizer, i, example, template)]
    rows.sort(key=lambda row: len(row.ids))
    scores: list[dict[str, float]] = [{} for _ in examples]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        for row, log_p in zip(batch, _log_probabilities(model, batch), strict=True):
            for candidate, own in row.candidates.items():
                token = torch.tensor(own, device=log_p.device)
                steps = torch.arange(len(own), device=log_p.device)
                scores[row.example][candidate] = log_p[steps, token].sum().item()
    model.train(was_training)
    return [
        Prediction(e.id, e.answer, max(e.candidates, key=s.__getitem__), {c: s[c] for c in e.candidates})
        for e, s in zip(examples, scores, strict=True)
    ]


def _rows(tokenizer, index: int, example: Example, template: str) -> list[_Row]:
    text = prompt(example, template) + ANSWER_PREFIX
    encoded = tokenizer([text + candidate for candidate in example.candidates])["input_ids"]
    start = 0
    while len({tuple(ids[: start + 1]) for ids in encoded}) == 1 and start < min(map(len, encoded)) - 1:
        start += 1
    own = {c: ids[start:] for c, ids in zip(example.candidates, encoded, strict=True)}
    if all(len(tokens) == 1 for tokens in own.values()):
        return [_Row(index, encoded[0][:start], start, own)]
    return [_Row(index, encoded[i][:-1], start, {c: own[c]}) for i, c in enumerate(example.candidates)]


def _log_probabilities(model, batch: list[_Row]) -> list[Tensor]:
    """For each row log p of the tokens after position `start - 1` on: (tokens, vocabulary) float32."""
    device = model.get_input_embeddings().weight.device
    longest = max(len(row.ids) for row in batch)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in batch], device=device)  # (rows, longest)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (rows, longest, hidden)
    wanted = [hidden[i, row.start - 1 : len(row.ids)] for i, row in enumerate(batch)]
    logits = model.get_output_embeddings()(torch.cat(wanted)).float()  # (positions, vocabulary)
    return list(logits.log_softmax(-1).split([len(part) for part in wanted]))
