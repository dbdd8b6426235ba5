"""Examples of a task, from the mini-world, from LLM-Adapters, or from any local folder, through the same loader."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from dora_lab import tasks
from dora_lab.fetch import COMMIT, fetch, files_of, llm_adapters_folder, repository_path
from dora_lab.profiles import PROJECT, VALIDATION_EXAMPLES
from dora_lab.tasks import ANSWER_PREFIX, Example, Task, parse_record, prompt

if TYPE_CHECKING:  # loaded when a run is, so that the command line starts quickly
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
MINI_WORLD = PROJECT / "data" / "miniworld" / "tasks"
LLM_ADAPTERS = "llm-adapters"
IGNORED = -100  # label of a token that the loss leaves out
CARVED_SEED = 42  # which train examples become validation where a folder has no validation.json
CUT_SEED = 256  # which train examples lose their answer to `answers_cut`: the same for every run, as in a file


def data_folder(source: str) -> Path:
    """The folder of a profile's `data`: the mini-world's, the cache of LLM-Adapters, or the path as given.

    Raises FileNotFoundError, except for the cache: it is filled when a file of it is wanted.
    """
    if source == LLM_ADAPTERS:
        return llm_adapters_folder() / "dataset"
    folder = MINI_WORLD if source == "mini-world" else Path(source).expanduser()
    if not folder.is_dir():
        advice = "run `dora-lab pretrain` or restore data/miniworld" if source == "mini-world" else "check the path"
        raise FileNotFoundError(f"data folder {folder} does not exist: {advice}")
    return folder


def load_examples(
    source: str, task_name: str, split: str, limit: int | None = None, validation_examples: int | None = None
) -> list[Example]:
    """Checked examples of one task and split, the first `limit` of them.

    A folder without `validation.json` has its validation examples drawn from `train.json` (`validation_examples` of
    them, 300 unless told); they are then left out of the train split. The test split of a mixture is those of its parts
    one after another, each giving its share of `limit`; their ids say which is which.
    `source` "llm-adapters" fetches what the cache lacks.
    Raises FileNotFoundError for a file that is missing and cannot be fetched, ValueError for a bad one, naming file and
    index.
    """
    task = tasks.task(task_name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if split == "test" and task.parts:
        return _of_parts(source, task.parts, limit)
    own_validation = source != LLM_ADAPTERS and (data_folder(source) / task.folder / "validation.json").is_file()
    if split == "test" or own_validation:
        examples = _read(_path(source, task, split), task_name, split)
    else:
        path = _path(source, task, "train")
        examples = _read(path, task_name, "train")
        count = VALIDATION_EXAMPLES if validation_examples is None else validation_examples
        if count >= len(examples):
            raise ValueError(
                f"{path} has {len(examples)} examples, too few to hold {count} back for validation: "
                "add a validation.json or set validation_examples lower"
            )
        held_back = set(random.Random(CARVED_SEED).sample(range(len(examples)), count))
        examples = [e for i, e in enumerate(examples) if (i in held_back) == (split == "validation")]
    if split == "validation" and own_validation and validation_examples is not None:
        examples = examples[:validation_examples]
    return examples[:limit]


def data_sha256(source: str, task_name: str) -> str:
    """One hash over the task's files, names and contents: part of a run's identity.

    Of LLM-Adapters, commit and paths are hashed: they say what the contents are before anything is fetched.
    """
    task = tasks.task(task_name)
    if source == LLM_ADAPTERS:
        names = [f"{COMMIT}/{file.path}" for _, _, file in files_of(task_name)]
        return hashlib.sha256("\0".join(names).encode()).hexdigest()
    folder = data_folder(source) / task.folder
    paths = {split: folder / f"{split}.json" for split in SPLITS}
    if not any(path.is_file() for path in paths.values()):
        raise FileNotFoundError(f"{folder} has none of {', '.join(p.name for p in paths.values())}: put them there")
    digest = hashlib.sha256()
    for split, path in paths.items():
        if path.is_file():
            digest.update(f"{split}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    for part in task.parts:
        digest.update(f"{part}\0".encode() + data_sha256(source, part).encode())
    return digest.hexdigest()


def count_fetched(task: Task, split: str) -> int:
    """Records of a `train` or `test` file of LLM-Adapters, fetched if it is not there yet, every one checked.

    Raises what `load_examples` raises.
    """
    return len(_read(_path(LLM_ADAPTERS, task, split), task.name, split))


def fetch_data(source: str, task_name: str) -> None:
    """Bring a task's files of LLM-Adapters into the cache, so that no run needs the network; others are there.

    Raises what `fetch` raises.
    """
    if source == LLM_ADAPTERS:
        for _, _, file in files_of(task_name):
            fetch(file.path)


def tokenized(
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    template: str,
    append_eos: bool,
    cutoff_tokens: int | None,
    train_on_prompt: bool = False,
    cut: str = "prompt",
    answers_cut: float = 0.0,
) -> tuple[Dataset, int]:
    """(input_ids and labels of every example, how many were cut); the labels of the prompt are IGNORED.

    cutoff_tokens None cuts nothing. cut "prompt": one that is too long loses the beginning of its prompt, never the
    answer behind it; "end": it loses its end, as in the report's code, though nothing of the answer may be left.
    train_on_prompt: the labels of the prompt are its tokens. answers_cut: that share of the examples, rounded to whole
    ones, end where their answer begins.
    Raises ValueError if the answer alone is too long, or an end token is asked for and the tokenizer has none.
    """
    import datasets

    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError("the base model's tokenizer has no end token: set append_eos to false")
    prompts = [prompt(example, template) for example in examples]
    texts = [text + ANSWER_PREFIX + e.answer for text, e in zip(prompts, examples, strict=True)]
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    drawn = set(random.Random(CUT_SEED).sample(range(len(texts)), round(answers_cut * len(texts))))
    count = 0
    encoded = zip(tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"], strict=True)
    for index, (alone, ids) in enumerate(encoded):
        start = shared_length(alone, ids)
        kept, answer = ids[:start], ids[start:] + [tokenizer.eos_token_id] * append_eos
        if index in drawn:
            count, answer = count + 1, []
        elif cutoff_tokens is not None and start + len(answer) > cutoff_tokens:
            count += 1
            if cut == "end":
                kept, answer = kept[:cutoff_tokens], answer[: max(0, cutoff_tokens - start)]
            elif len(answer) >= cutoff_tokens:
                raise ValueError(
                    f"cutoff_tokens {cutoff_tokens} is too small: an answer alone has {len(answer)} tokens"
                )
            else:
                kept = shortened(kept, cutoff_tokens - len(answer), tokenizer.bos_token_id)
        columns["input_ids"].append(kept + answer)
        columns["labels"].append((kept if train_on_prompt else [IGNORED] * len(kept)) + answer)
    return datasets.Dataset.from_dict(columns), count


def shared_length(ids: list[int], others: list[int]) -> int:
    """How many tokens two sequences have in common before they differ or one ends."""
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))


def shortened(ids: list[int], length: int, bos_token_id: int | None) -> list[int]:
    """The last `length` tokens at most; a token that begins every sequence stays at the front."""
    if len(ids) <= length:
        return ids
    front = ids[:1] if ids[0] == bos_token_id else []
    return front + ids[len(ids) - length + len(front) :]


def _path(source: str, task: Task, split: str) -> Path:
    if source == LLM_ADAPTERS:
        return fetch(repository_path(task, split))
    return data_folder(source) / task.folder / f"{split}.json"


def _of_parts(source: str, parts: tuple[str, ...], limit: int | None) -> list[Example]:
    shares = [None if limit is None else (limit + i) // len(parts) for i in range(len(parts))]
    return [e for part, share in zip(parts, shares, strict=True) for e in load_examples(source, part, "test", share)]


def _read(path: Path, task_name: str, split: str) -> list[Example]:
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist: put LLM-Adapters' {split} file of {task_name} there")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch or restore the file") from error
    except json.JSONDecodeError as error:
        place = f"{error}, in record {_whole_records(error.doc)}"
        raise ValueError(f"{path} is not valid JSON ({place}): fetch or restore the file") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a non-empty list of records, got {type(records).__name__}")
    task = tasks.task(task_name)
    return [
        parse_record(record, task, f"{path}, record {index}", f"{task_name}-{split}-{index}")
        for index, record in enumerate(records)
    ]


def _whole_records(text: str) -> int:
    """How many records of a list come before the place where its JSON breaks."""
    decoder, position, count = json.JSONDecoder(), text.find("[") + 1, 0
    while position:
        try:
            _, position = decoder.raw_decode(text, len(text) - len(text[position:].lstrip(" \t\r\n,")))
        except json.JSONDecodeError:
            break
        count += 1
    return count
