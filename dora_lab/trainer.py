"""The Hugging Face Trainer with a fixed order of examples and checkpoints that hold what is trained alone.

A step reads `spec.examples_per_step` examples, in micro-batches, on one process or several: which examples, and which
loss, do not depend on how they are split.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from dora_lab import processes, shards
from dora_lab.data import IGNORED
from dora_lab.files import write_text
from dora_lab.guards import AtCheckpoints, base_weights, check_parameters, geometry
from dora_lab.models import answer_loss, checkpoint_layers
from dora_lab.profiles import check_shared
from dora_lab.sealed import checkpoints, seal, writing
from dora_lab.specs import RunSpec

OPTIMIZERS = {"adamw": "adamw_torch", "adamw-8bit": "adamw_bnb_8bit", "paged-adamw": "paged_adamw_32bit"}
SORTED_BATCHES = 50  # batches whose examples are sorted by length together


def order(lengths: list[int], spec: RunSpec) -> list[int]:
    """Which example is read when, for the whole run: one shuffle after another, from the seed alone.

    lengths: tokens of every example. With `spec.length_grouped`, `SORTED_BATCHES` batches at a time are sorted by
    length, and then shuffled as batches, so that a batch has little padding.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    size = spec.examples_per_step
    wanted = spec.steps * size
    shuffles = [torch.randperm(len(lengths), generator=generator) for _ in range(math.ceil(wanted / len(lengths)))]
    indices = torch.cat(shuffles)[:wanted].tolist()
    if not spec.length_grouped:
        return indices
    grouped: list[int] = []
    for first in range(0, wanted, SORTED_BATCHES * size):
        part = sorted(indices[first : first + SORTED_BATCHES * size], key=lambda i: lengths[i], reverse=True)
        for batch in torch.randperm(len(part) // size, generator=generator).tolist():
            grouped += part[batch * size : (batch + 1) * size]
    return grouped


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Pad on the right to the longest row: (rows, longest). `models.answer_logits` says why there is no mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])  # (rows, longest)
        for name, fill in (("input_ids", 0), ("labels", IGNORED))
    }


class RunTrainer(Trainer):
    """One run's training; `micro` examples at a time over all processes, the profile's unless given.

    A checkpoint: `trainable.safetensors`, the optimizer's, scheduler's and random generators' states, the Trainer's
    state with the curve so far, `progress.json` with times and update geometry so far, and the seal. With `chosen_on`,
    rows that are not trained on, also `best.safetensors`, the state so far with the lowest loss on them; `train` ends
    with it.
    Raises ValueError if the processes cannot share a micro-batch.
    """

    def __init__(
        self,
        spec: RunSpec,
        model,
        rows: datasets.Dataset,
        folder: Path,
        progress: bool,
        micro: int | None = None,
        chosen_on: datasets.Dataset | None = None,
    ):
        self.micro = micro = micro or spec.micro_batch_size or spec.batch_size
        half = spec.dtype == "float16" and torch.cuda.is_available()  # gradients too small for it are scaled up
        arguments = TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            max_steps=spec.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=spec.examples_per_step // micro,
            learning_rate=spec.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=spec.warmup_steps,
            weight_decay=spec.weight_decay,
            max_grad_norm=spec.max_grad_norm,
            optim=OPTIMIZERS[spec.optimizer],
            fp16=half,
            use_cpu=processes.count() > 1 and not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            seed=spec.seed,
            logging_steps=max(1, spec.steps // 50),
            logging_nan_inf_filter=False,
            save_strategy="no",  # AtCheckpoints says when
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        if arguments.world_size != processes.count():
            raise ValueError(
                f"{processes.count()} processes were launched, the Trainer sees {arguments.world_size}: start them "
                "with `accelerate launch` or `torchrun`, as `-m dora_lab.training`"
            )
        check_shared(micro, arguments.world_size)
        arguments.per_device_train_batch_size = micro // arguments.world_size
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used by several processes, or not at all
        if spec.gradient_checkpointing:
            checkpoint_layers(model)
        set_seed(spec.seed)
        if shards.asked_for():
            shards.shard(model)
        callbacks = [AtCheckpoints(self, spec, folder, model.get_input_embeddings().num_embeddings, progress)]
        with _accepted(model), shards.done_here():
            super().__init__(model, arguments, collate, train_dataset=rows, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        if arguments.world_size > 1:
            torch.manual_seed(spec.seed + arguments.process_index)  # each process drops other numbers
        self.geometry: list[dict] = []
        self.train_time_s = self.steps_time_s = 0.0
        self.base_weights = base_weights(model) if spec.geometry else {}
        self.chosen_on, self.best, self.best_state = chosen_on, {}, {}

    def train(self, *args, **kwargs):
        self._clock = time.perf_counter()
        output = super().train(*args, **kwargs)
        self._count_time()
        if self.best:
            self._set_trained(self.best_state)
        return output

    def measure_geometry(self, step: int) -> None:
        """Add the rows of this step; none if the run does not ask for them."""
        self.geometry += geometry(self.model, self.base_weights, step)

    def compare_checkpoint(self, step: int) -> None:
        """Keep this step's state if its loss on `chosen_on` is the lowest so far; the earlier one of two equal ones."""
        if self.chosen_on is None:
            return
        loss = self._loss_on(self.chosen_on)
        if loss < self.best.get("loss", math.inf):
            self.best = {"step": step, "loss": loss}
            self.best_state = {name: shards.whole(p.detach()).clone() for name, p in trained(self.model)}

    @torch.no_grad()
    def _loss_on(self, rows: datasets.Dataset) -> float:
        """Cross-entropy per labelled token, without dropout."""
        total, count, device = 0.0, 0, self.model.device
        self.model.eval()
        for first in range(0, len(rows), self.micro):
            batch = collate(rows.select(range(first, min(first + self.micro, len(rows)))).to_list())
            own = int((batch["labels"][:, 1:] != IGNORED).sum())
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, {name: value.to(device) for name, value in batch.items()})
            total, count = total + loss.item() * own, count + own
        self.model.train()
        return total / count

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.train_time_s += now - self._clock
        self._clock = now

    def _get_train_sampler(self, *args) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # `order` has shuffled it

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """Cross-entropy per labelled token, averaged over those of all micro-batches and processes of the step."""
        loss, labelled = answer_loss(model, inputs)
        if num_items_in_batch is None:
            return loss / labelled
        loss = loss / num_items_in_batch
        return loss * self.args.world_size if self.args.world_size > 1 else loss  # gradients are averaged over them

    def _save_checkpoint(self, model, trial) -> None:
        folder, main = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", self.args.should_save
        check_parameters({name: shards.whole(p) for name, p in trained(self.model)}, self.state.global_step)
        with writing(folder):
            if main:
                shutil.rmtree(folder, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                seal(folder)
        if main:
            for old in checkpoints(folder.parent)[2:]:  # the last stays, and the one before should it be damaged
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        tensors = {name: shards.whole(p.detach()).contiguous() for name, p in trained(self.model)}
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "trainable.safetensors")
        self._count_time()
        if self.best:
            save_file(self.best_state, folder / "best.safetensors")
        kept = {name: getattr(self, name) for name in ("train_time_s", "steps_time_s", "geometry", "best")}
        write_text(folder / "progress.json", json.dumps(kept))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        self._set_trained(load_file(folder / "trainable.safetensors"))
        for name, value in json.loads((folder / "progress.json").read_text()).items():
            setattr(self, name, value)
        if self.best:
            self.best_state = load_file(folder / "best.safetensors")

    @torch.no_grad()
    def _set_trained(self, state: dict[str, Tensor]) -> None:
        for name, parameter in trained(self.model):
            parameter.copy_(shards.part(state[name], like=parameter))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._change_states(lambda state, parameter: shards.whole(state))  # a checkpoint serves whole and sharded runs
        super()._save_optimizer_and_scheduler(output_dir)
        self._change_states(shards.part)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._change_states(shards.part)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """While the micro-batches of a step but the last are read: their gradients are reduced together."""
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)

    def _change_states(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace what the optimizer keeps of every number of a sharded parameter."""
        for parameter, states in self.optimizer.state.items() if shards.is_sharded(self.model) else ():
            for name, state in states.items():
                if state.shape == parameter.shape:
                    states[name] = change(state, parameter)


def trained(model) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that have gradients."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def _accepted(model):
    """The Trainer takes a quantised base with PEFT's adapters only; while it looks, this one's count as such."""
    quantised = getattr(model, "is_quantized", False)
    if quantised:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if quantised:
            model._hf_peft_config_loaded = False
