"""One run from its spec to its record: load, attach, train on the Hugging Face Trainer, evaluate, record.

A run that was interrupted goes on from its last whole checkpoint and ends in the same predictions, bit for bit: the
order of the examples follows from the seed alone, and a checkpoint holds everything else that the next step depends on.

On several GPUs: `accelerate launch -m dora_lab.training --profile llama-7b --task boolq --method dora`.
"""

import argparse
import contextlib
import gc
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset

from dora_lab import processes, shards
from dora_lab.adapters import attach, trainable_parameters
from dora_lab.checkpoint import save_adapter
from dora_lab.data import load_examples, tokenized
from dora_lab.evaluation import PROTOCOLS, Prediction, accuracy, accuracy_by_task, as_row, per_token
from dora_lab.files import prepare_folder, write_lines, write_text
from dora_lab.guards import curve_rows
from dora_lab.locks import locked
from dora_lab.models import check_vocabulary, load_config, load_model, load_tokenizer
from dora_lab.preflight import advice, check_memory, plan_of, preflight
from dora_lab.profiles import load_profile
from dora_lab.records import (
    FAILURE,
    LIVE_CURVE,
    RunRecord,
    RunResult,
    environment,
    is_done,
    read_record,
    run_folder,
    write_failure,
    write_record,
)
from dora_lab.sealed import last_whole_checkpoint, writing
from dora_lab.specs import PARAMETERS, RunSpec
from dora_lab.tasks import Example, task
from dora_lab.trainer import RunTrainer, order

NOTE = "micro_batch_size"  # file in a run's folder: how many examples a process may read at a time, as memory ran out


def finetune(spec: RunSpec, runs_dir: str | Path = "runs", progress: bool = True) -> RunRecord:
    """Do the run, or return its record if it is done. Everything it writes is in `run_folder(runs_dir, spec)`.

    The same spec gives the same predictions bit for bit on the same machine, interrupted or not. A second process with
    the same spec waits for the first, unless both were launched together to share it. `progress` prints a line at every
    checkpoint. A GPU that is too small for the micro-batch gets a smaller one, which the record says, at the same
    number of examples a step.
    Raises OSError if the folder cannot be written; ValueError or FileNotFoundError for a base model or data that do not
    serve, a rank that does not fit, a plan that does not fit, a loss that is no longer a number or diverges, a record
    that is damaged; RuntimeError if the GPU is too small for the smallest micro-batch. What went wrong is noted in the
    folder as well; what is finished stays.
    """
    folder = run_folder(runs_dir, spec)
    threads = torch.get_num_threads()
    with processes.first(lambda: _prepare(folder), lambda: locked(folder)):
        if is_done(folder):
            return read_record(folder)
        try:
            torch.set_num_threads(spec.threads)
            return _run(spec, folder, progress and processes.is_first())
        except Exception as error:
            if processes.count() == 1 or not (folder / FAILURE).exists():  # the first of several to fail says why
                with contextlib.suppress(OSError):
                    write_failure(folder, spec, f"{type(error).__name__}: {error}")
            raise
        finally:
            torch.set_num_threads(threads)


def _prepare(folder: Path) -> None:
    prepare_folder(folder)
    if processes.count() > 1:
        (folder / FAILURE).unlink(missing_ok=True)


def _run(spec: RunSpec, folder: Path, progress: bool) -> RunRecord:
    preflight(spec)
    limit = spec.test_examples if spec.split == "test" else None
    with processes.one_after_another():  # the first one fetches
        questions = load_examples(spec.data, spec.task, spec.split, limit, spec.validation_examples)
        examples = load_examples(spec.data, spec.task, "train", spec.train_examples, spec.validation_examples)
        tokenizer = load_tokenizer(spec.base_model, spec.revision, spec.tokenizer)
        config = load_config(spec.base_model, spec.revision)
    check_vocabulary(spec.base_model, tokenizer, config.vocab_size)
    cutoff = getattr(config, "max_position_embeddings", None) if spec.cutoff_tokens == "auto" else spec.cutoff_tokens
    reading = (spec.prompt, spec.append_eos, cutoff, spec.train_on_prompt, spec.cut)
    rows, shortened = tokenized(tokenizer, examples, *reading, spec.answers_cut)
    lengths = [len(ids) for ids in rows["input_ids"]]
    if shortened:
        lost = "their end, the answer with it" if spec.cut == "end" else "the beginning of their prompt"
        lost = "their answer to answers_cut" if spec.answers_cut else f"{lost} to {cutoff} tokens"
        warnings.warn(f"{shortened} of {len(rows)} training examples lose {lost}", stacklevel=2)
    check_memory(spec, max(lengths))
    chosen_on = tokenized(tokenizer, _held_out(spec), *reading)[0] if spec.best_of_checkpoints else None

    trainer, trainable, total, resumed = _train(spec, rows, lengths, folder, progress, chosen_on)
    curve = curve_rows(trainer.state.log_history)
    began = time.perf_counter()
    predictions = _evaluate(spec, trainer, tokenizer, questions)
    evaluation_time = time.perf_counter() - began

    result = RunResult(
        accuracy=accuracy(predictions),
        n=len(predictions),
        correct=sum(p.prediction == p.gold for p in predictions),
        chance=sum(1 / len(question.candidates) for question in questions) / len(questions),
        unparsed_rate=sum(not p.parsed for p in predictions) / len(predictions),
        trainable_parameters=trainable,
        total_parameters=total,
        train_loss=_mean_loss(curve),
        train_time_s=trainer.train_time_s,
        step_time_s=trainer.steps_time_s / spec.steps,
        evaluation_time_s=evaluation_time,
        peak_memory_bytes=_peak_memory_bytes(),
        resumed=resumed,
        shortened_prompts=shortened,
        accuracy_per_token=accuracy(per_token(predictions)) if spec.evaluation == "likelihood" else None,
        accuracy_by_task=accuracy_by_task(predictions) if task(spec.task).parts else None,
        micro_batch_size=trainer.micro,
        base_revision=getattr(trainer.model.config, "_commit_hash", None),
        processes=processes.count(),
        chosen_step=trainer.best.get("step"),
    )
    record = RunRecord(spec, result, environment(spec.threads))
    if processes.is_first():
        _write(folder, record, predictions, curve, trainer.geometry)
    _save_model(spec, trainer, tokenizer, folder)
    if processes.is_first():
        write_record(folder, record)
        for name in (LIVE_CURVE, NOTE):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if progress:
        print(f"{result.correct} of {result.n} questions right ({result.accuracy:.1%})", flush=True)
    return record


def _held_out(spec: RunSpec) -> list[Example]:
    """The validation examples on which the best checkpoint is chosen. Raises ValueError if there are too few."""
    found = load_examples(spec.data, spec.task, "validation", spec.best_of_checkpoints, spec.validation_examples)
    if len(found) < spec.best_of_checkpoints:
        raise ValueError(
            f"best_of_checkpoints asks for {spec.best_of_checkpoints} validation examples, {spec.task} has "
            f"{len(found)}: set it lower"
        )
    return found


def _train(
    spec: RunSpec, rows: Dataset, lengths: list[int], folder: Path, progress: bool, chosen_on: Dataset | None
) -> tuple[RunTrainer, int, int, bool]:
    """(the trainer after its last step, trained and total parameters, whether it went on from a checkpoint).

    Where the GPU's memory does not do, once more with micro-batches of half the size, from the last whole checkpoint.
    Of several processes one that has no memory left cannot ask the others, which wait for it inside a step: it leaves a
    note of that size for one process and fails, the launcher ends the others, and the run as it is started again, on as
    many processes as there are then, goes by the note.
    """
    note = folder / NOTE
    noted = processes.told_by_first(lambda: note.read_text() if note.is_file() else None)
    shares = processes.count()
    micro = spec.micro_batch_size or spec.batch_size
    if noted:
        micro = largest_micro_batch(spec.examples_per_step, min(int(noted) * shares, micro), shares) or micro
    while True:
        full = ""
        try:
            return _train_with(spec, rows, lengths, folder, progress, micro, chosen_on)
        except torch.OutOfMemoryError as error:  # what it holds of the failed step is freed behind this block
            full = str(error).splitlines()[0]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        planned = plan_of(spec, tokens=max(lengths), micro=micro)
        change = advice(planned) if planned else "set micro_batch_size lower, or gradient_checkpointing to true"
        smaller = largest_micro_batch(spec.examples_per_step, micro // 2, shares)
        if smaller is None:
            raise RuntimeError(f"out of GPU memory with micro-batches of {micro} ({full}): {change}")
        if shares > 1:
            write_text(note, f"{smaller // shares}\n")
            raise RuntimeError(
                f"out of GPU memory with micro-batches of {micro} in process {processes.rank()} ({full}): run the same "
                f"command again, and it goes on from its last checkpoint with {smaller} at a time, the same "
                f"{spec.examples_per_step} a step; {change}"
            )
        warnings.warn(
            f"out of GPU memory with micro-batches of {micro}; going on with {smaller} at a time, the same "
            f"{spec.examples_per_step} a step. {change[0].upper()}{change[1:]}",
            stacklevel=2,
        )
        micro = smaller


def _train_with(
    spec: RunSpec,
    rows: Dataset,
    lengths: list[int],
    folder: Path,
    progress: bool,
    micro: int,
    chosen_on: Dataset | None,
) -> tuple[RunTrainer, int, int, bool]:
    shards.check(spec.method, spec.quantisation, spec.optimizer, spec.dtype)
    device = "cpu" if shards.asked_for() else processes.device()  # a GPU is to hold its part alone
    with shards.done_here():
        model = load_model(spec.base_model, spec.dtype, device, spec.revision, spec.quantisation)
    attach(model, spec.adapter_config, torch.Generator().manual_seed(spec.seed))
    trainable, total = trainable_parameters(model)
    trainer = RunTrainer(spec, model, rows.select(order(lengths, spec)), folder, progress, micro, chosen_on)
    checkpoint = processes.told_by_first(lambda: last_whole_checkpoint(folder / "checkpoints"))
    if checkpoint and progress:
        print(f"going on from step {checkpoint.name.rpartition('-')[2]}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer, trainable, total, checkpoint is not None


def largest_micro_batch(effective: int, most: int, shares: int = 1) -> int | None:
    """The largest divisor of `effective`, at most `most`, that `shares` processes can share; None if none is."""
    return next((size for size in range(most, 0, -1) if effective % size == 0 and size % shares == 0), None)


def _evaluate(spec: RunSpec, trainer: RunTrainer, tokenizer, questions: list) -> list[Prediction]:
    """Predictions in the order of the questions; several processes share them, with a sharded model all do the same."""
    answer = PROTOCOLS[spec.evaluation]
    shared = processes.count() > 1 and not shards.is_sharded(trainer.model)
    own = questions[processes.rank() :: processes.count()] if shared else questions
    try:
        template = spec.evaluation_prompt or spec.prompt
        found = answer(trainer.model, tokenizer, own, template, spec.evaluation_batch_size) if own else []
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"out of GPU memory with {spec.evaluation_batch_size} questions at a time: set evaluation_batch_size lower"
        ) from error
    if not shared:
        return found
    by_id = {p.id: p for part in processes.gathered(found) for p in part}
    return [by_id[question.id] for question in questions]


def _write(folder: Path, record: RunRecord, predictions: list[Prediction], curve: list[dict], geometry: list) -> None:
    write_lines(folder / "predictions.jsonl", [as_row(p) for p in predictions])
    write_lines(folder / "curve.jsonl", curve)
    if record.spec.geometry:
        write_lines(folder / "geometry.jsonl", geometry)


def _save_model(spec: RunSpec, trainer: RunTrainer, tokenizer, folder: Path) -> None:
    """The whole model or the adapter, by the first process."""
    model = trainer.model
    if shards.is_sharded(model):
        shards.keep_adapters_whole(model)
    if not processes.is_first():
        return
    if spec.method == "full":
        with writing(folder / "model"):
            model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
    else:
        save_adapter(model, folder / "adapter")


def _mean_loss(curve: list[dict]) -> float:
    """Loss per labelled token averaged over all steps; a row of the curve stands for the steps since the row before."""
    starts = [0, *(row["step"] for row in curve)]
    return sum(row["loss"] * (row["step"] - start) for row, start in zip(curve, starts, strict=False)) / starts[-1]


def _peak_memory_bytes() -> int:
    """Peak GPU memory, or the peak resident memory of this process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: list[str] | None = None) -> None:
    """One run from the command line, for `accelerate launch`; the parameters are those of notebook 07."""
    parser = argparse.ArgumentParser(prog="dora_lab.training", description=main.__doc__)
    for name, kind in PARAMETERS.items():
        required = name in ("profile", "task", "method")
        default = {"runs_dir": "runs", "seed": 0, "split": "test"}.get(name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, required=required, default=default)
    values = vars(parser.parse_args(arguments))
    runs_dir, profile = values.pop("runs_dir"), values.pop("profile")
    with processes.launched():
        try:
            finetune(RunSpec.from_profile(load_profile(profile), **values), runs_dir)
        except (ValueError, OSError, RuntimeError) as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
