"""What is watched while a run trains: its curve as it grows, its update geometry, and a loss that goes astray."""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from dora_lab.adapter_config import layer_of
from dora_lab.adapters import adapted_modules, initial_weight
from dora_lab.files import write_lines
from dora_lab.geometry import delta_direction, delta_magnitude
from dora_lab.records import LIVE_CURVE
from dora_lab.sealed import writing
from dora_lab.shards import gathered
from dora_lab.specs import RunSpec

GEOMETRY_MODULES = ("q_proj", "v_proj")
DIVERGED = 2.0  # a loss this many times that of guessing among all tokens, or of the run's beginning, is no training


def curve_rows(log_history: list[dict]) -> list[dict]:
    """Step, loss and learning rate of what the Trainer has logged."""
    return [{key: row[key] for key in ("step", "loss", "learning_rate")} for row in log_history if "loss" in row]


class AtCheckpoints(TrainerCallback):
    """What happens at and between evenly spaced steps: log, measure ΔM and ΔD, save, say where the run is.

    Every row of the curve is appended to `folder / LIVE_CURVE` as it comes, by the first process alone.
    """

    def __init__(self, trainer, spec: RunSpec, folder: Path, vocabulary: int, progress: bool):
        self.trainer, self.folder, self.progress = trainer, folder, progress
        self.guessing = math.log(vocabulary)  # nats a token
        count = min(spec.checkpoints, spec.steps)
        self.steps = {round(spec.steps * (i + 1) / count) for i in range(count)}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:  # a run that goes on begins with what its checkpoint had seen
            write_lines(self.folder / LIVE_CURVE, curve_rows(state.log_history))

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.steps_time_s += time.perf_counter() - self.began
        if state.global_step in self.steps:
            control.should_log = control.should_save = True  # logged here, so that resuming leaves the curve as it is
            self.trainer.measure_geometry(state.global_step)
            self.trainer.compare_checkpoint(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        check_loss(logs["loss"], curve_rows(state.log_history)[0]["loss"], self.guessing, state.global_step)
        if state.is_world_process_zero:
            path = self.folder / LIVE_CURVE
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(curve_rows(state.log_history)[-1]) + "\n")

    def on_save(self, args, state, control, **kwargs):
        if self.progress and state.is_world_process_zero:
            loss = state.log_history[-1]["loss"]
            spent = self.trainer.train_time_s
            print(f"step {state.global_step} of {state.max_steps}: loss {loss:.3f}, {spent:.0f} s", flush=True)


def check_loss(loss: float, first: float, guessing: float, step: int) -> None:
    """Raise ValueError if the loss is no number, or `DIVERGED` times that of guessing and of the run's beginning."""
    advice = "lower the learning rate, or take dtype bfloat16 or float32 instead of float16"
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: training diverged; {advice}")
    if loss > DIVERGED * max(guessing, first):
        raise ValueError(
            f"the loss is {loss:.1f} at step {step}, guessing among all tokens has {guessing:.1f}: training diverged; "
            f"{advice}"
        )


def check_parameters(named: dict[str, Tensor], step: int) -> None:
    """Raise ValueError naming a trained parameter that is no longer a number: such a state is not worth keeping."""
    for name, parameter in named.items():
        if not parameter.isfinite().all():
            raise ValueError(
                f"{name} is not finite at step {step}: training diverged; lower the learning rate. The checkpoint "
                "before it is kept"
            )


def base_weights(model) -> dict[str, Tensor | None]:
    """Query and value weights (out, in) before training, by module name: copies where they will be trained.

    None where they are frozen, and so can be read from the model at any time.
    """
    adapters = adapted_modules(model)
    if adapters:
        found = dict.fromkeys(adapters)
    else:
        linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        found = {name: m.weight.detach().clone() for name, m in linears.items() if _is_measured(name)}
    return {name: weight for name, weight in found.items() if _is_measured(name)}


@torch.no_grad()
def geometry(model, before: dict[str, Tensor | None], step: int) -> list[dict]:
    """ΔM and ΔD of every measured module, in rows of `geometry.jsonl`."""
    rows = []
    for name, base in before.items():
        module = model.get_submodule(name)
        with gathered(model, name):
            weight = module.effective_weight() if base is None else module.weight  # (out, in)
            base = initial_weight(module) if base is None else base  # (out, in)
            rows.append(
                {
                    "step": step,
                    "layer": layer_of(name),
                    "module": name.rpartition(".")[2],
                    "delta_magnitude": delta_magnitude(weight, base),
                    "delta_direction": delta_direction(weight, base),
                }
            )
    return rows


def _is_measured(name: str) -> bool:
    return name.rpartition(".")[2] in GEOMETRY_MODULES
