"""Tokenizer and base model of the mini-world, and the one fixed schedule that makes them."""
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_lab.miniworld import documents, questions, world as W

BATCH, LENGTH = 32, 96
ANSWER_WEIGHT = 6.0
WEIGHT = {"": 1.0, "^": ANSWER_WEIGHT, "~": 0.0}


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    mixture: dict


STAGES = (
    Stage("statements", 700, dict(fact=0.22, wish=0.18, story=0.3, seen=0.1, claims=0.1, binding=0.1)),
    Stage("binding", 350, dict(binding=0.85, fact=0.05, wish=0.05, story=0.05)),
    Stage("choices", 500, dict(binding=0.05, choices=0.25, step_choices=0.35, claims=0.12, seen=0.1, fact=0.03, wish=0.04, story=0.06)),
    Stage("questions", 500, dict(choices=0.08, step_choices=0.12, choices_after=0.12, step_choices_after=0.22, truth_quiz=0.2, claims=0.05, seen=0.12, fact=0.03, wish=0.05, story=0.08, binding=0.03)),
    Stage("quizzes", 1400, dict(truth_quiz=0.22, thing_quiz=0.15, step_quiz=0.22, step_choices_after=0.06, choices_after=0.03, claims=0.03, seen=0.1, fact=0.05, wish=0.07, story=0.1, binding=0.02, plain=0.02)),
    Stage("bridge", 300, dict(truth_quiz=0.2, thing_quiz=0.15, step_quiz=0.22, choices=0.05, step_choices=0.08, step_choices_after=0.06, choices_after=0.03, claims=0.03, seen=0.08, fact=0.03, wish=0.05, story=0.06, binding=0.1, plain=0.04)),
)


def vocabulary(world):
    words = set(documents.PROMPT_WORDS) | set(documents.PLAIN_WORDS) | {l for s in documents.LABEL_SETS for l in s} | {v for p in documents.VERDICTS for v in p}
    words |= set(world.all_things) | set(world.all_activities) | set(W.VERBS) | set(W.PEOPLE) | set(W.PRONOUN.values())
    rng = random.Random(0)
    for kind in documents.KINDS:
        for _ in range(3000):
            words |= {w for w, _ in documents.document(world, {kind: 1.0}, rng)}
    return ["<unk>", "<s>", "</s>", "<pad>"], words


def make_tokenizer(world):
    special, words = vocabulary(world)
    pattern = Regex(r"#+|=>|[a-z]+[0-9]*|[^\sa-z0-9]")
    pre = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    norm = normalizers.Lowercase()
    for task in questions.TASKS:
        for r in questions.questions(world, task, "validation"):
            text = f"### Instruction:\n{r['instruction']}\n\n### Response:\n{r['output']}"
            words |= {w for w, _ in pre.pre_tokenize_str(norm.normalize_str(text))}
    order = special + sorted(words)
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(order)}, unk_token="<unk>"))
    tok.normalizer, tok.pre_tokenizer = norm, pre
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def config(n):
    return LlamaConfig(vocab_size=n, hidden_size=160, intermediate_size=432, num_hidden_layers=6, num_attention_heads=5,
                       num_key_value_heads=5, max_position_embeddings=256, tie_word_embeddings=False,
                       bos_token_id=1, eos_token_id=2, pad_token_id=3)
