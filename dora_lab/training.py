"""One run from its spec to its record: load, attach, train on the Hugging Face Trainer, evaluate, record.

A run that was interrupted goes on from its last whole checkpoint and ends in the same predictions, bit for bit: the
order of the examples follows from the seed alone, and a checkpoint holds everything else that the next step depends on.
"""

import contextlib
import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from dora_lab.adapters import AdapterConfig, adapted_modules, attach, trainable_parameters
from dora_lab.checkpoint import save_adapter
from dora_lab.data import IGNORED, load_examples, tokenized
from dora_lab.evaluation import PROTOCOLS, accuracy, accuracy_by_task, as_row, per_token
from dora_lab.geometry import delta_direction, delta_magnitude
from dora_lab.models import answer_logits, load_base
from dora_lab.records import (
    RunRecord,
    RunResult,
    RunSpec,
    environment,
    is_done,
    locked,
    prepare_folder,
    read_record,
    run_folder,
    write_failure,
    write_lines,
    write_record,
    write_text,
)
from dora_lab.tasks import task

GEOMETRY_MODULES = ("q_proj", "v_proj")
SEAL = "whole.json"  # written last into a checkpoint: the hash of each of its files


def finetune(spec: RunSpec, runs_dir: str | Path = "runs", progress: bool = True) -> RunRecord:
    """Do the run, or return its record if it is done. Everything it writes is in `run_folder(runs_dir, spec)`.

    The same spec gives the same predictions bit for bit on the same machine, interrupted or not. A second process with
    the same spec waits for the first. `progress` prints a line at every checkpoint.
    Raises OSError if the folder cannot be written; ValueError or FileNotFoundError for a base model or data that do not
    serve, a rank that does not fit, a loss that is no longer a number, a record that is damaged. What went wrong is
    noted in the folder as well; what is finished stays.
    """
    folder = run_folder(runs_dir, spec)
    prepare_folder(folder)
    threads = torch.get_num_threads()
    with locked(folder):
        if is_done(folder):
            return read_record(folder)
        try:
            torch.set_num_threads(spec.threads)
            return _run(spec, folder, progress)
        except Exception as error:
            with contextlib.suppress(OSError):
                write_failure(folder, spec, f"{type(error).__name__}: {error}")
            raise
        finally:
            torch.set_num_threads(threads)


def _run(spec: RunSpec, folder: Path, progress: bool) -> RunRecord:
    limit = spec.test_examples if spec.split == "test" else None
    questions = load_examples(spec.data, spec.task, spec.split, limit, spec.validation_examples)
    examples = load_examples(spec.data, spec.task, "train", spec.train_examples, spec.validation_examples)
    model, tokenizer = load_base(spec.base_model, spec.dtype)
    config = AdapterConfig(spec.method, spec.rank, spec.alpha, spec.dropout, tuple(spec.target_modules))
    attach(model, config, torch.Generator().manual_seed(spec.seed))
    trainable, total = trainable_parameters(model)
    rows, shortened_prompts = tokenized(tokenizer, examples, spec.prompt, spec.append_eos, spec.cutoff_tokens)

    trainer = _RunTrainer(spec, model, rows.select(_order(len(rows), spec)), folder / "checkpoints", progress)
    checkpoint = _last_whole_checkpoint(folder / "checkpoints")
    if checkpoint and progress:
        print(f"going on from step {checkpoint.name.rpartition('-')[2]}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    curve = [
        {key: row[key] for key in ("step", "loss", "learning_rate")}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    began = time.perf_counter()
    evaluate = PROTOCOLS[spec.evaluation]
    predictions = evaluate(model, tokenizer, questions, spec.prompt, spec.evaluation_batch_size)
    evaluation_time = time.perf_counter() - began

    correct = sum(p.prediction == p.gold for p in predictions)
    result = RunResult(
        accuracy=correct / len(predictions),
        n=len(predictions),
        correct=correct,
        chance=sum(1 / len(question.candidates) for question in questions) / len(questions),
        unparsed_rate=sum(not p.parsed for p in predictions) / len(predictions),
        trainable_parameters=trainable,
        total_parameters=total,
        train_loss=_mean_loss(curve),
        train_time_s=trainer.train_time_s,
        step_time_s=trainer.steps_time_s / spec.steps,
        evaluation_time_s=evaluation_time,
        peak_memory_bytes=_peak_memory_bytes(),
        resumed=checkpoint is not None,
        shortened_prompts=shortened_prompts,
        accuracy_per_token=accuracy(per_token(predictions)) if spec.evaluation == "likelihood" else None,
        accuracy_by_task=accuracy_by_task(predictions) if task(spec.task).parts else None,
    )
    write_lines(folder / "predictions.jsonl", [as_row(p) for p in predictions])
    write_lines(folder / "curve.jsonl", curve)
    if spec.geometry:
        write_lines(folder / "geometry.jsonl", trainer.geometry)
    if spec.method == "full":
        with _writing(folder / "model"):
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
    else:
        save_adapter(model, folder / "adapter")
    record = RunRecord(spec, result, environment(spec.threads))
    write_record(folder, record)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if progress:
        print(f"{result.correct} of {result.n} questions right ({result.accuracy:.1%})", flush=True)
    return record


def _order(examples: int, spec: RunSpec) -> list[int]:
    """Which example is read when, for the whole run: one shuffle after another, from the seed alone."""
    generator = torch.Generator().manual_seed(spec.seed)
    wanted = spec.steps * spec.batch_size * spec.gradient_accumulation
    shuffles = [torch.randperm(examples, generator=generator) for _ in range(math.ceil(wanted / examples))]
    return torch.cat(shuffles)[:wanted].tolist()


def _collate(rows: list[dict]) -> dict[str, Tensor]:
    """Pad on the right to the longest row: (rows, longest). `answer_logits` says why there is no mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])  # (rows, longest)
        for name, fill in (("input_ids", 0), ("labels", IGNORED))
    }


class _RunTrainer(Trainer):
    """The Trainer with a fixed order of examples, and checkpoints that are sealed and hold trained parameters only.

    A checkpoint: `trainable.safetensors`, the optimizer's, scheduler's and random generators' states, the Trainer's
    state with the curve so far, `progress.json` with times and update geometry so far, and the seal.
    """

    def __init__(self, spec: RunSpec, model, rows: datasets.Dataset, folder: Path, progress: bool):
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size,
            gradient_accumulation_steps=spec.gradient_accumulation,
            learning_rate=spec.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=spec.warmup_steps,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm,
            optim="adamw_torch",
            seed=spec.seed,
            logging_steps=max(1, spec.steps // 50),
            logging_nan_inf_filter=False,
            save_strategy="no",  # _AtCheckpoints says when
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        set_seed(spec.seed)
        callbacks = [_AtCheckpoints(self, spec, progress)]
        super().__init__(model, arguments, _collate, train_dataset=rows, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.geometry: list[dict] = []
        self.train_time_s = self.steps_time_s = 0.0
        self.base_weights = _base_weights(model) if spec.geometry else {}

    def train(self, *args, **kwargs):
        self._clock = time.perf_counter()
        output = super().train(*args, **kwargs)
        self._count_time()
        return output

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.train_time_s += now - self._clock
        self._clock = now

    def _get_train_sampler(self, *args) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # _order has shuffled it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """Cross-entropy per answer token, averaged over the answer tokens of all micro-batches of the step."""
        labels = inputs["labels"][:, 1:]  # (rows, longest - 1): the token after each position
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        logits = answer_logits(model, inputs["input_ids"], rows, columns)  # (positions, vocabulary)
        loss = F.cross_entropy(logits, labels[rows, columns], reduction="sum")
        return loss / (len(rows) if num_items_in_batch is None else num_items_in_batch)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with _writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
            write_text(folder / SEAL, json.dumps(hashes, indent=1) + "\n")
        for old in _checkpoints(folder.parent)[2:]:  # the last stays, and the one before should the last be damaged
            shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in _trained(self.model)}, folder / "trainable.safetensors")
        self._count_time()
        kept = {name: getattr(self, name) for name in ("train_time_s", "steps_time_s", "geometry")}
        write_text(folder / "progress.json", json.dumps(kept))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        saved = load_file(folder / "trainable.safetensors")
        with torch.no_grad():
            for name, parameter in _trained(self.model):
                parameter.copy_(saved[name])
        for name, value in json.loads((folder / "progress.json").read_text()).items():
            setattr(self, name, value)


class _AtCheckpoints(TrainerCallback):
    """What happens at and between evenly spaced steps: log, measure ΔM and ΔD, save, say where the run is."""

    def __init__(self, trainer: _RunTrainer, spec: RunSpec, progress: bool):
        self.trainer, self.progress = trainer, progress
        count = min(spec.checkpoints, spec.steps)
        self.steps = {round(spec.steps * (i + 1) / count) for i in range(count)}

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trainer.steps_time_s += time.perf_counter() - self.began
        if state.global_step in self.steps:
            control.should_log = control.should_save = True  # logged here, so that resuming leaves the curve as it is
            self.trainer.geometry += _geometry(model, self.trainer.base_weights, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"the loss is {logs['loss']} at step {state.global_step}: training diverged; lower the learning rate"
            )

    def on_save(self, args, state, control, **kwargs):
        if self.progress:
            loss = state.log_history[-1]["loss"]
            spent = self.trainer.train_time_s
            print(f"step {state.global_step} of {state.max_steps}: loss {loss:.3f}, {spent:.0f} s", flush=True)


def _trained(model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _base_weights(model) -> dict[str, Tensor]:
    """Query and value weights (out, in) before training, by module name: copies where they will be trained."""
    adapters = adapted_modules(model)
    if adapters:
        found = {name: module.base.weight for name, module in adapters.items()}
    else:
        found = {name: m.weight.clone() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: w.detach() for name, w in found.items() if name.rpartition(".")[2] in GEOMETRY_MODULES}


@torch.no_grad()
def _geometry(model, base_weights: dict[str, Tensor], step: int) -> list[dict]:
    rows = []
    for name, base in base_weights.items():
        module = model.get_submodule(name)
        weight = module.effective_weight() if hasattr(module, "effective_weight") else module.weight  # (out, in)
        rows.append(
            {
                "step": step,
                "layer": next(int(part) for part in name.split(".") if part.isdigit()),
                "module": name.rpartition(".")[2],
                "delta_magnitude": delta_magnitude(weight, base),
                "delta_direction": delta_direction(weight, base),
            }
        )
    return rows


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were sealed; what is damaged or half-written is deleted."""
    for checkpoint in _checkpoints(folder):
        with contextlib.suppress(OSError, ValueError):  # no seal, or half of one
            hashes = json.loads((checkpoint / SEAL).read_text())
            if all(_sha256(checkpoint / name) == digest for name, digest in hashes.items()):
                return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Whatever a writer raises for want of space or permission becomes an OSError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        raise OSError(
            f"cannot write {path} ({error}): free space there and run again; whole checkpoints stay"
        ) from error


def _mean_loss(curve: list[dict]) -> float:
    """Loss per answer token averaged over all steps; a row of the curve stands for the steps since the row before."""
    starts = [0, *(row["step"] for row in curve)]
    return sum(row["loss"] * (row["step"] - start) for row, start in zip(curve, starts, strict=False)) / starts[-1]


def _peak_memory_bytes() -> int:
    """Peak GPU memory, or the peak resident memory of this process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
