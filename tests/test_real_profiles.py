"""The shipped LLaMA profiles on real questions and LLaMA's tokenizer, with a small random Llama for a base."""

import json
import shutil
from dataclasses import replace

import pytest
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_lab.data import IGNORED, load_examples, tokenized
from dora_lab.files import read_lines
from dora_lab.models import load_tokenizer
from dora_lab.profiles import load_profile
from dora_lab.records import read_predictions, run_folder
from dora_lab.report_recipe import evaluation_text
from dora_lab.specs import RunSpec
from dora_lab.tasks import prompt
from dora_lab.training import finetune

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def small_base(tmp_path_factory, real_data):
    """A random Llama of two layers with LLaMA's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(real_data / "llama_tokenizer" / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, real_data):
    """BoolQ as it is, and a part of the one HellaSwag file as train."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(real_data / "llm_adapters" / "boolq", folder / "boolq")
    records = json.loads((real_data / "llm_adapters" / "hellaswag" / "validation_reconstructed.json").read_text())
    (folder / "hellaswag").mkdir()
    for split, part in (("test", records[:1000]), ("train", records[8000:9000])):
        (folder / "hellaswag" / f"{split}.json").write_text(json.dumps(part))
    return folder


def run_of(name, small_base, data, task, method, **changes):
    profile = replace(load_profile(name), base_model=str(small_base), data=str(data))
    spec = RunSpec.from_profile(profile, task, method, rank=8, steps=3)
    return replace(spec, test_examples=4, train_examples=100, warmup_steps=1, checkpoints=1, threads=1, **changes)


@pytest.mark.parametrize("task", ["boolq", "hellaswag"])
def test_the_mended_recipe_cuts_nothing(small_base, data, tmp_path, task):
    spec = run_of("llama-7b", small_base, data, task, "dora")
    record = finetune(spec, tmp_path, progress=False)
    assert record.result.shortened_prompts == 0 and record.result.n == 4
    assert all(p["log_likelihoods"] for p in read_predictions(run_folder(tmp_path, spec)))


def test_the_recipe_as_reported_cuts_answers_of_hellaswag_and_says_how_many(small_base, data, tmp_path):
    changes = {"micro_batch_size": 4, "dtype": "float32", "evaluation": "likelihood"}  # the CPU is slow at the others
    spec = run_of("llama-7b-as-reported", small_base, data, "hellaswag", "dora", **changes)
    with pytest.warns(UserWarning, match=r"\d+ of 100 training examples lose their end, the answer with it to 256"):
        record = finetune(spec, tmp_path, progress=False)
    assert 0 < record.result.shortened_prompts < 100
    assert read_lines(run_folder(tmp_path, spec) / "curve.jsonl")[0]["loss"] == pytest.approx(10.4, abs=0.5)


def test_a_quantised_base_on_real_questions(small_base, data, tmp_path):
    spec = run_of("llama-7b", small_base, data, "boolq", "dora", quantisation="nf4")
    assert finetune(spec, tmp_path, progress=False).result.n == 4


def test_the_reports_prompt_ends_in_other_tokens_when_it_is_trained_on(small_base, data):
    """15 spaces and "the" joined to one of them in training; a lone token of 16 spaces when the model is asked."""
    tokenizer = load_tokenizer(str(small_base))
    examples = load_examples(str(data), "boolq", "test", limit=20)
    rows, _ = tokenized(tokenizer, examples, "alpaca-indented", True, None, train_on_prompt=True)
    for row, example in zip(rows, examples, strict=True):
        text = prompt(example, "alpaca-indented")
        assert text == evaluation_text(example)
        assert text.endswith("### Response:\n" + 16 * " ") and "\n" + 16 * " " + example.instruction in text
        asked = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        trained = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert asked[-1] == 16 * "▁" and trained[len(asked) - 1 : len(asked) + 1] == [15 * "▁", "▁the"]
        assert IGNORED not in row["labels"]


def test_llamas_file_is_read_as_sentencepiece_reads_it(small_base, data, real_data):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(real_data / "llama_tokenizer" / "tokenizer.model"))
    tokenizer = load_tokenizer(str(small_base))
    texts = [f"Response:\n{n * ' '}the answer{n * ' '}" for n in range(40)]
    for task in ("boolq", "hellaswag"):
        for template in ("alpaca", "alpaca-indented"):
            examples = load_examples(str(data), task, "test", limit=300)
            texts += [prompt(e, template) + "the correct answer is " + e.answer for e in examples]
    for text in texts:
        assert tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]
