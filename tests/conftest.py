"""Fixtures: a tiny random Llama with its tokenizer, tiny task files, and a profile that uses them."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may touch the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from dora_lab.profiles import PROJECT, load_profile
from dora_lab.specs import RunSpec

THINGS = [f"thing{i}" for i in range(24)]
ADJECTIVES = ("heavy", "light", "hot", "cold")


def _boolq(i: int) -> dict:
    thing, adjective = THINGS[i % 24], ADJECTIVES[(i // 24) % 4]
    answer = "true" if (i * 7 + i // 24) % 3 else "false"
    question = f"is the {'very ' * (i % 3)}{adjective} {thing} {adjective}?"
    return _record(f"question: {question}\n\nAnswer format: true/false", answer)


def _winogrande(i: int) -> dict:
    one, other = THINGS[i % 24], THINGS[(i + 5) % 24]
    text = f"the {one} met the {other} and _ was {ADJECTIVES[i % 4]}.\n\nOption1: {one} Option2: {other} "
    return _record(text + "Answer format: option1/option2", f"option{i % 2 + 1}")


def _hellaswag(i: int) -> dict:
    endings = " ".join(f"Ending{k + 1}: {ADJECTIVES[(i + k) % 4]}" for k in range(4))
    text = f"the {THINGS[i % 24]} is\n\n{endings}\n\nAnswer format: ending1/ending2/ending3/ending4"
    return _record(text, f"ending{i % 4 + 1}")


def _record(instruction: str, answer: str) -> dict:
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Task files in LLM-Adapters' form. boolq has all three splits, the other tasks no validation.json."""
    folder = tmp_path_factory.mktemp("tiny_data")
    for task, make in (("boolq", _boolq), ("winogrande", _winogrande), ("hellaswag", _hellaswag)):
        (folder / task).mkdir()
        for split, indices in (("train", range(40)), ("validation", range(40, 56)), ("test", range(56, 80))):
            if split != "validation" or task == "boolq":
                (folder / task / f"{split}.json").write_text(json.dumps([make(i) for i in indices]))
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tiny_data) -> Path:
    """A random Llama of 2 layers, hidden size 32, and a word-level tokenizer, as a base model folder."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    splitter = pre_tokenizers.Split(Regex(r"[A-Za-z0-9]+|\n|[^\sA-Za-z0-9]"), behavior="removed", invert=True)
    words = {"#", "Instruction", "Response", ":", "\n"}
    for path in sorted(tiny_data.glob("*/*.json")):
        for record in json.loads(path.read_text()):
            text = f"{record['instruction']} {record['output']}"
            words |= {word for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    folder = tmp_path_factory.mktemp("tiny_base")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_profile(tmp_path_factory, tiny_base, tiny_data) -> Path:
    """A profile file on the tiny base and data; a run takes about a second."""
    tasks, methods = ["boolq", "hellaswag", "winogrande"], ["full", "lora", "dora", "dora-magnitude"]
    profile = {
        "name": "tiny",
        "summary": "for tests",
        "base_model": str(tiny_base),
        "data": str(tiny_data),
        "tasks": tasks,
        "methods": methods,
        "seeds": [0, 1],
        "rank": 2,
        "scaling": 2.0,
        "dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        "prompt": "alpaca-short",
        "append_eos": False,
        "cutoff_tokens": 64,
        "steps": dict.fromkeys(tasks, 12),
        "batch_size": 4,
        "warmup_steps": 2,
        "learning_rate": {method: dict.fromkeys(tasks, 0.01) for method in methods},
        "learning_rate_grid": [0.001, 0.01],
        "sweep_seeds": [100],
        "evaluation_batch_size": 8,
        "validation_examples": 10,
    }
    path = tmp_path_factory.mktemp("tiny_profile") / "tiny.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


@pytest.fixture(scope="session")
def tiny_spec(tiny_profile) -> Callable[..., RunSpec]:
    """`tiny_spec(task, method, **changed fields)`: a run of the tiny profile."""

    def make(task: str = "boolq", method: str = "dora", **changes) -> RunSpec:
        return replace(RunSpec.from_profile(load_profile(tiny_profile), task, method), **changes)

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real LLM-Adapters files and the LLaMA tokenizer; skips the test where it is absent."""
    folder = PROJECT.parent / "shared" / "data"
    if not (folder / "llm_adapters").is_dir():
        pytest.skip(f"no real task files: {folder / 'llm_adapters'} does not exist")
    return folder


@pytest.fixture
def report_cache(real_data, tmp_path_factory, monkeypatch) -> Path:
    """A cache with the report's raw outputs, the real task files and LLaMA's tokenizer; returns the outputs' folder."""
    if not (real_data / "report_outputs").is_dir():
        pytest.skip(f"no raw outputs of the report: {real_data / 'report_outputs'} does not exist")
    cache = tmp_path_factory.mktemp("report_cache")
    monkeypatch.setenv("DORA_LAB_CACHE", str(cache))
    outputs, dataset = cache / "report-outputs", cache / "llm-adapters" / "dataset"
    dataset.mkdir(parents=True)
    outputs.mkdir()
    (outputs / "results").symlink_to(real_data / "report_outputs")
    (cache / "llama_tokenizer").symlink_to(real_data / "llama_tokenizer")
    for task in ("boolq", "winogrande"):
        (dataset / task).symlink_to(real_data / "llm_adapters" / task)
    (dataset / "hellaswag").mkdir()
    rebuilt = real_data / "llm_adapters" / "hellaswag" / "validation_reconstructed.json"
    (dataset / "hellaswag" / "test.json").symlink_to(rebuilt)
    return outputs
