"""One run from its spec to its record: load, attach, train on the Hugging Face Trainer, evaluate, record.

A run that was interrupted goes on from its last whole checkpoint and ends in the same predictions.
"""

import gc
import logging
import math
import resource
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from dora_lab import tasks
from dora_lab.adapters import AdapterConfig, adapted_modules, attach, trainable_parameters
from dora_lab.checkpoint import load_adapter, save_adapter
from dora_lab.data import load_examples
from dora_lab.evaluation import likelihood
from dora_lab.geometry import delta_direction, delta_magnitude
from dora_lab.models import load_base
from dora_lab.records import (
    RunRecord,
    RunResult,
    RunSpec,
    environment,
    is_done,
    locked,
    prepare_folder,
    read_lines,
    read_record,
    run_folder,
    write_lines,
    write_record,
)
from dora_lab.tasks import ANSWER_PREFIX, Example, prompt

IGNORED = -100  # label of a token that the loss leaves out
GEOMETRY_MODULES = ("q_proj", "v_proj")
logger = logging.getLogger(__name__)


def finetune(spec: RunSpec, runs_dir: str | Path = "runs", progress: bool = True) -> RunRecord:
    """Do the run, or return its record if it is done. Everything it writes is in `run_folder(runs_dir, spec)`.

    The same spec gives the same predictions bit for bit on the same machine, interrupted or not.
    Raises OSError if the folder cannot be written, ValueError or FileNotFoundError for a bad base model or data.
    """
    folder = run_folder(runs_dir, spec)
    prepare_folder(folder)
    with locked(folder):
        return read_record(folder) if is_done(folder) else _run(spec, folder, progress)


def _run(spec: RunSpec, folder: Path, progress: bool) -> RunRecord:
    torch.set_num_threads(spec.threads)
    set_seed(spec.seed)
    train = load_examples(spec.data, spec.task, "train", spec.train_examples, spec.validation_examples)
    limit = spec.test_examples if spec.split == "test" else None
    questions = load_examples(spec.data, spec.task, spec.split, limit, spec.validation_examples)
    model, tokenizer = load_base(spec.base_model, spec.dtype)
    if torch.cuda.is_available():
        model.cuda()
    watch = _watched_weights(model) if spec.geometry else {}
    config = AdapterConfig(spec.method, spec.rank, spec.alpha, spec.dropout, tuple(spec.target_modules))
    attach(model, config, torch.Generator().manual_seed(spec.seed))
    trainable, total = trainable_parameters(model)

    rows = datasets.Dataset.from_list([_tokenize(tokenizer, example, spec) for example in train])
    trainer = _AdapterTrainer(
        model=model,
        args=_arguments(spec, folder, progress),
        train_dataset=rows,
        data_collator=_collate,
        callbacks=[_Checkpoints(spec, folder, watch)],
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)
    resume_from = _last_whole_checkpoint(folder)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    train_time = time.perf_counter() - began
    curve = [
        {"step": row["step"], "loss": row["loss"], "learning_rate": row["learning_rate"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    if not curve or not math.isfinite(curve[-1]["loss"]):
        raise ValueError(f"training diverged (loss {curve[-1]['loss'] if curve else 'none'}): lower the learning rate")
    del trainer
    gc.collect()

    began = time.perf_counter()
    predictions = likelihood(model, tokenizer, questions, spec.prompt, spec.evaluation_batch_size)
    evaluation_time = time.perf_counter() - began
    correct = sum(p.prediction == p.gold for p in predictions)
    done_steps = spec.steps - (int(resume_from.name.rsplit("-", 1)[1]) if resume_from else 0)
    result = RunResult(
        accuracy=correct / len(predictions),
        n=len(predictions),
        correct=correct,
        chance=tasks.task(spec.task).chance,
        unparsed_rate=sum(not p.parsed for p in predictions) / len(predictions),
        trainable_parameters=trainable,
        total_parameters=total,
        train_loss=curve[-1]["loss"],
        train_time_s=train_time,
        step_time_s=train_time / max(1, done_steps),
        evaluation_time_s=evaluation_time,
        peak_memory_bytes=_peak_memory_bytes(),
        resumed=resume_from is not None,
    )
    write_lines(folder / "predictions.jsonl", [asdict(p) for p in predictions])
    write_lines(folder / "curve.jsonl", curve)
    if spec.method == "full":
        model.save_pretrained(folder / "model")
    else:
        save_adapter(model, folder / "adapter")
    record = RunRecord(spec, result, environment(spec.threads))
    write_record(folder, record)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return record


def _tokenize(tokenizer, example: Example, spec: RunSpec) -> dict[str, list[int]]:
    """input_ids and labels of one example; the prompt is masked from the loss.

    A prompt too long for `cutoff_tokens` loses its beginning, never the answer behind it.
    """
    text = prompt(example, spec.prompt)
    whole = tokenizer(text + ANSWER_PREFIX + example.answer)["input_ids"]
    shared = 0
    for one, other in zip(tokenizer(text)["input_ids"], whole, strict=False):
        if one != other:
            break
        shared += 1
    answer = whole[shared:] + ([tokenizer.eos_token_id] if spec.append_eos else [])
    kept = whole[:shared][-max(1, spec.cutoff_tokens - len(answer)) :]
    return {"input_ids": kept + answer, "labels": [IGNORED] * len(kept) + answer}


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row: (rows, longest). No mask: no token sees what follows it."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("labels", IGNORED))
    }
    return padded


def _arguments(spec: RunSpec, folder: Path, progress: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(spec.warmup_steps, spec.steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch",
        seed=spec.seed,
        data_seed=spec.seed,
        logging_steps=max(1, spec.steps // 25),
        save_strategy="no",  # _Checkpoints says when
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=not progress,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class _AdapterTrainer(Trainer):
    """The Trainer, with checkpoints that hold the adapter alone (the model for `full`)."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.model.adapter_config.method == "full":
            self.model.save_pretrained(output_dir)
        else:
            save_adapter(self.model, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.model.adapter_config.method == "full":
            saved, _ = load_base_weights(resume_from_checkpoint)
            self.model.load_state_dict(saved)
        else:
            load_adapter(self.model, resume_from_checkpoint)


def load_base_weights(folder: str | Path) -> tuple[dict[str, torch.Tensor], Path]:
    """(state dict of a fully trained checkpoint, its file)."""
    from safetensors.torch import load_file

    file = Path(folder) / "model.safetensors"
    return load_file(file), file


class _Checkpoints(TrainerCallback):
    """Saves at evenly spaced steps, and notes ΔM and ΔD of query and value weights there."""

    def __init__(self, spec: RunSpec, folder: Path, watch: dict[str, torch.Tensor]):
        count = min(spec.checkpoints, spec.steps)
        self.at = {round(spec.steps * (i + 1) / count) for i in range(count)}
        self.file, self.watch = folder / "geometry.jsonl", watch

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step not in self.at:
            return
        control.should_save = state.global_step < args.max_steps  # the end is recorded, not checkpointed
        if not self.watch:
            return
        rows = read_lines(self.file) if self.file.exists() else []
        rows = [row for row in rows if row["step"] < state.global_step]
        adapters = adapted_modules(model)
        with torch.no_grad():
            for name, base in self.watch.items():
                weight = adapters[name].effective_weight() if name in adapters else model.get_submodule(name).weight
                layer = next(int(part) for part in name.split(".") if part.isdigit())
                rows.append(
                    {
                        "step": state.global_step,
                        "layer": layer,
                        "module": name.rsplit(".", 1)[-1],
                        "delta_magnitude": delta_magnitude(weight, base),
                        "delta_direction": delta_direction(weight, base),
                    }
                )
        write_lines(self.file, rows)


def _watched_weights(model) -> dict[str, torch.Tensor]:
    """Copies of the query and value weights before training, by module name."""
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in GEOMETRY_MODULES
    }


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; damaged ones (a run killed while saving) are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for checkpoint in found:
        try:
            _read_through(checkpoint)
            return checkpoint
        except Exception as error:  # whatever a half-written file makes its reader raise
            logger.warning("%s is damaged (%s): going back to the one before", checkpoint, error)
            shutil.rmtree(checkpoint)
    return None


def _read_through(checkpoint: Path) -> None:
    from safetensors.torch import load_file
    from transformers import TrainerState

    weights = next(checkpoint.glob("*.safetensors"), None)
    if weights is None:
        raise FileNotFoundError("no weights")
    load_file(weights)
    TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)
    if not next(checkpoint.glob("rng_state*.pth"), None):
        raise FileNotFoundError("no random state")


def _peak_memory_bytes() -> int:
    """Peak GPU memory of this process, or its peak resident memory where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
