"""The prompt of the report's recipe, token by token: what training reads, what evaluation reads, what a cut-off takes.

The recipe, that of LLM-Adapters, writes its template inside an indented function, so that every line after the first
begins with 16 spaces. Training appends the answer and then cuts the whole at 256 tokens; evaluation asks with the
template up to the answer. Tokens are SentencePiece's own, from LLaMA's `tokenizer.model`: a converted tokenizer can
split runs of spaces in another way.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from dora_lab.fetch import cache_folder
from dora_lab.tasks import ANSWER_PREFIX, Example

CUTOFF = 256
INDENT = 16 * " "
_OPENING = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE = f"{_OPENING}\n\n{INDENT}### Instruction:\n{INDENT}"
RESPONSE = f"\n{INDENT}\n{INDENT}### Response:\n{INDENT}"


@dataclass(frozen=True)
class Border:
    """The last tokens of the prompt and the first of the answer, as training and as evaluation read them."""

    training: tuple[str, ...]
    evaluation: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether evaluation ends with tokens that training has in the same place."""
        return self.training[: len(self.evaluation)] == self.evaluation


def tokenizer_path() -> Path:
    """Where LLaMA's `tokenizer.model` is looked for."""
    return cache_folder() / "llama_tokenizer" / "tokenizer.model"


def load_tokenizer(path: str | Path | None = None) -> sentencepiece.SentencePieceProcessor:
    """LLaMA's tokenizer. Raises FileNotFoundError saying where to put it."""
    path = tokenizer_path() if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"LLaMA's tokenizer.model is not here: put it into {path.parent}")
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def evaluation_text(example: Example) -> str:
    """What the model is asked."""
    return PREAMBLE + example.instruction + RESPONSE


def training_text(example: Example) -> str:
    """What the model is trained on: prompt and answer."""
    return evaluation_text(example) + ANSWER_PREFIX + example.answer


def border(tokenizer: sentencepiece.SentencePieceProcessor, example: Example, before: int = 4) -> Border:
    """The tokens from `before` ahead of the line where the answer begins, to the answer's second word."""
    asked = tokenizer.encode(evaluation_text(example), out_type=str)
    trained = tokenizer.encode(training_text(example), out_type=str)
    start = len(asked) - 1 - before  # of both: they differ in the last token of the prompt at the earliest
    return Border(tuple(trained[start : start + before + 4]), tuple(asked[start:]))


def token_counts(tokenizer: sentencepiece.SentencePieceProcessor, examples: Iterable[Example]) -> list[int]:
    """Tokens of prompt and answer with the token that begins every sequence, without an end token."""
    return [1 + len(ids) for ids in tokenizer.encode([training_text(example) for example in examples])]


def answers_lost(counts: Iterable[int], cutoff: int = CUTOFF) -> float:
    """Share of examples that lose at least the last token of their answer: the option, ending or truth value itself."""
    counts = list(counts)
    return sum(count > cutoff for count in counts) / len(counts)
