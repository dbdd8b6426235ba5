"""The tokenizer and the base model of the mini-world, and the one fixed schedule that makes them.

The hidden matrices are trained by Muon (`torch.optim.Muon`), embeddings and norms by AdamW; AdamW alone did not learn
the facts in this time. Documents are packed into rows of `LENGTH` tokens. The stages follow one another because the
skills need each other: facts before labels, labels before questions, questions before questions between other words.

Exactly reproducible: world, text, tokenizer and task files (only `random.Random`, from fixed seeds). The weights repeat
bit for bit on the same machine with the same torch and thread count; elsewhere the sums round otherwise, and the model
is the same only statistically: same schedule, about the same skills, not the same numbers.
"""

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_lab.miniworld.documents import (
    KINDS,
    LABEL_SETS,
    PLAIN_WORDS,
    PROMPT_WORDS,
    TASK_LABEL_SETS,
    VERDICTS,
    document,
)
from dora_lab.miniworld.questions import TASKS, questions, write_task_files
from dora_lab.miniworld.world import PEOPLE, PRONOUN, VERBS, World, build_world

SEED = 0
BATCH, LENGTH = 32, 96  # rows and tokens of a step
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS, DECAY_SHARE, FLOOR = 60, 0.35, 0.03  # linear decay over the last 35 % of the steps, down to 3 %
TOKEN_WEIGHT = {"": 1.0, "^": 6.0, "~": 0.0}  # of a token in the loss, by its mark in the text
PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n{output}"


@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps on documents drawn from `mixture` (kind of document -> share)."""

    name: str
    steps: int
    mixture: dict[str, float]


STAGES = (
    Stage(
        "statements", 700, {"fact": 0.22, "wish": 0.18, "story": 0.30, "seen": 0.10, "claims": 0.10, "binding": 0.10}
    ),
    Stage("binding", 300, {"binding": 0.85, "fact": 0.05, "wish": 0.05, "story": 0.05}),
    Stage(
        "choices",
        450,
        {
            **{"choices": 0.25, "step_choices": 0.35, "claims": 0.12},
            **{"binding": 0.05, "seen": 0.10, "fact": 0.03, "wish": 0.04, "story": 0.06},
        },
    ),
    Stage(
        "questions",
        500,
        {
            **{"choices": 0.06, "step_choices": 0.10, "choices_after": 0.10, "step_choices_after": 0.22},
            **{"truth_quiz": 0.18, "claims": 0.04},
            **{"binding": 0.03, "seen": 0.12, "fact": 0.03, "wish": 0.04, "story": 0.08},
        },
    ),
    Stage(
        "quizzes",
        2250,
        {
            **{"truth_quiz": 0.19, "guess_quiz": 0.06, "thing_quiz": 0.09, "step_quiz": 0.24},
            **{"choices": 0.02, "step_choices": 0.05, "choices_after": 0.02, "step_choices_after": 0.07},
            **{"claims": 0.02, "binding": 0.04, "seen": 0.07, "fact": 0.03, "wish": 0.04, "story": 0.06, "plain": 0.01},
        },
    ),
)
# What the pretraining curve tells of, in this order.
SKILLS = ("wish", "story", "binding", "claims", "step_choices", "truth_quiz", "thing_quiz", "step_quiz")


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """One token a word, digits kept with their word (`option1`), punctuation alone, everything lower case."""
    pattern = Regex(r"#+|=>|[a-z]+[0-9]*|[^\sa-z0-9]")
    split = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    lower = normalizers.Lowercase()
    words = {*PROMPT_WORDS, *PLAIN_WORDS, *VERBS, *PEOPLE, *PRONOUN.values(), *world.all_things, *world.all_activities}
    words.update(*LABEL_SETS, *TASK_LABEL_SETS, *VERDICTS)
    rng = random.Random(SEED)
    for kind in KINDS:
        words.update(word for _ in range(3000) for word, _ in document(world, {kind: 1.0}, rng))
    for task in TASKS:
        for record in questions(world, task, "validation"):
            text = lower.normalize_str(PROMPT.format(**record))
            words.update(word for word, _ in split.pre_tokenize_str(text))
    vocabulary = ["<unk>", "<s>", "</s>", "<pad>", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_model(vocabulary_size: int) -> LlamaForCausalLM:
    """A fresh Llama of 2.2 M parameters."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config)


class Text:
    """An endless stream of packed documents; `rng` and `left_over` are its whole state."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast):
        self.world, self.ids = world, tokenizer.get_vocab()
        self.rng = random.Random(SEED)
        self.left_over: list[tuple[int, float]] = []  # (token id, weight)

    def batch(self, mixture: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and loss weights, both (BATCH, LENGTH)."""
        while len(self.left_over) < BATCH * LENGTH:
            self.left_over.append((self.ids["<s>"], 0.0))
            words = document(self.world, mixture, self.rng)
            self.left_over += [(self.ids[word], TOKEN_WEIGHT[mark]) for word, mark in words]
        taken, self.left_over = self.left_over[: BATCH * LENGTH], self.left_over[BATCH * LENGTH :]
        ids, weights = zip(*taken, strict=True)
        return torch.tensor(ids).view(BATCH, LENGTH), torch.tensor(weights).view(BATCH, LENGTH)


def learning_rate(step: int, total: int) -> float:
    """Linear warm-up, constant, linear decay over the last `DECAY_SHARE` of the steps to `FLOOR` of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, (1 - step / total) / DECAY_SHARE)
    return PEAK_LEARNING_RATE * warmup * (FLOOR + (1 - FLOOR) * decay)


@torch.inference_mode()
def skills(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World, split: str, documents: int = 64
) -> dict[str, float]:
    """Kind of document -> share of its determined words that the model's most likely next word gets right.

    The documents that look like questions ask about the things and activities of `split`; pretraining asked about
    those of "train" alone.
    """
    asked = replace(
        world,
        things=world.things | {"train": world.things[split]},
        activities=world.activities | {"train": world.activities[split]},
    )
    ids, found = tokenizer.get_vocab(), {}
    for kind in SKILLS:
        rng = random.Random(kind)
        told_of = world if kind in ("wish", "story") else asked
        rows = [document(told_of, {kind: 1.0}, rng)[: LENGTH - 1] for _ in range(documents)]
        tokens = torch.full((documents, LENGTH), ids["<pad>"])
        determined = torch.zeros(documents, LENGTH, dtype=torch.bool)
        for i, words in enumerate(rows):
            tokens[i, : len(words) + 1] = torch.tensor([ids["<s>"], *(ids[word] for word, _ in words)])
            determined[i, 1 : len(words) + 1] = torch.tensor([mark == "^" for _, mark in words])
        right = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1) == tokens[:, 1:]
        found[kind] = round(right[determined[:, 1:]].float().mean().item(), 3)
    return found


def pretrain(
    out: Path, stages: tuple[Stage, ...] = STAGES, threads: int = 2, compile: bool = False, progress: bool = True
) -> None:
    """Write task files, tokenizer and base model to `out`: `out/tasks/`, `out/base/`, `out/pretraining.json`.

    Interrupted, it goes on from its last saved state (`out/state.pt`, every 200 steps) when called again.
    `compile` runs the model through torch.compile: faster, needs a C++ compiler, rounds otherwise.
    """
    torch.set_num_threads(threads)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    world = build_world()
    write_task_files(world, out / "tasks")
    tokenizer = make_tokenizer(world)
    model = make_model(len(tokenizer))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = (
        torch.optim.Muon(matrices, lr=PEAK_LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )
    text = Text(world, tokenizer)
    body = torch.compile(model.model, dynamic=False) if compile else model.model

    plan = [stage for stage in stages for _ in range(stage.steps)]
    curve: list[dict] = []
    learned: list[dict] = []
    state_file = out / "state.pt"
    start = _restore(state_file, model, optimizers, text, curve, learned, len(plan)) if state_file.exists() else 0
    began = time.monotonic()
    bar = tqdm(
        range(start, len(plan)), initial=start, total=len(plan), disable=not progress, mininterval=5, unit="step"
    )
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(plan))
        ids, weights = text.batch(plan[step].mixture)
        logits = F.linear(body(input_ids=ids, use_cache=False).last_hidden_state, model.lm_head.weight)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            determined = losses.detach()[weight == TOKEN_WEIGHT["^"]].mean().item()
            curve.append({"step": step + 1, "stage": plan[step].name, "loss": round(determined, 4)})
            bar.set_postfix(stage=plan[step].name, loss=f"{determined:.3f}")
        if (step + 1) % 200 == 0:
            learned.append(
                {"step": step + 1, "stage": plan[step].name, **skills(model, tokenizer, world, "validation")}
            )
            _save_state(state_file, model, optimizers, text, curve, learned, step + 1, len(plan))

    model.half().save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    made = {
        "steps": len(plan),
        "tokens": len(plan) * BATCH * LENGTH,
        "seconds": round(time.monotonic() - began) if start == 0 else None,
        "threads": threads,
        "compiled": compile,
        "torch": torch.__version__,
        "stages": [{"name": s.name, "steps": s.steps, "mixture": s.mixture} for s in stages],
        "curve": curve,
        "skills": learned,
    }
    (out / "pretraining.json").write_text(json.dumps(made, indent=1) + "\n")
    state_file.unlink(missing_ok=True)


def _save_state(
    file: Path, model, optimizers, text: Text, curve: list[dict], learned: list[dict], step: int, total: int
) -> None:
    version, internal, gauss = text.rng.getstate()
    state = {
        "step": step,
        "total": total,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": [version, list(internal), gauss],
        "left_over": text.left_over,
        "curve": curve,
        "skills": learned,
    }
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def _restore(file: Path, model, optimizers, text: Text, curve: list[dict], learned: list[dict], total: int) -> int:
    """Take up a saved state; returns the step to go on from."""
    state = torch.load(file, weights_only=True)
    if state["total"] != total:
        raise ValueError(
            f"{file} belongs to a schedule of {state['total']} steps, not {total}: delete it to start anew"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    version, internal, gauss = state["rng"]
    text.rng.setstate((version, tuple(internal), gauss))
    text.left_over = [tuple(pair) for pair in state["left_over"]]
    curve.extend(state["curve"])
    learned.extend(state["skills"])
    return state["step"]
