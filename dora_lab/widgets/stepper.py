"""The training stepper: a DoRA layer with two inputs and three outputs, fitted to a target one step at a time."""

from dataclasses import dataclass

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dora_lab.adapters import AdapterConfig, DoRALinear
from dora_lab.geometry import direction, magnitude
from dora_lab.widgets.panel import Drawing, Panel, button, canvas, log_axis, slider

START = torch.tensor([[1.6, 0.3], [0.4, 1.3], [-1.1, 0.9]])  # W0, (out, in)
TARGET = torch.tensor([[1.0, 0.9], [-0.6, 2.0], [-1.5, 0.2]])  # (out, in)
ROW_COLOURS, ROW_MARKERS = ("#0072B2", "#D55E00", "#009E73"), "os^"
STEPS = 60
LEARNING_RATES = (0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class ToyStep:
    """The layer after a step: magnitude (3,), direction V'/‖V'‖ (3, 2), and the loss ‖W' - target‖² / 6."""

    loss: float
    magnitude: Tensor
    direction: Tensor


def toy_fit(learning_rate: float, steps: int = STEPS, seed: int = 0) -> list[ToyStep]:
    """Gradient descent on m, A and B of rank 1 from W0 towards the target: the state before and after every step."""
    base = nn.Linear(2, 3, bias=False)
    base.weight = nn.Parameter(START.clone(), requires_grad=False)
    layer = DoRALinear(base, AdapterConfig("dora", rank=1, alpha=1), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD([layer.magnitude, layer.lora_A, layer.lora_B], lr=learning_rate)
    history = []
    for _ in range(steps + 1):
        weight = layer.effective_weight()  # (3, 2)
        loss = (weight - TARGET).square().mean()
        history.append(ToyStep(loss.item(), layer.magnitude.detach().clone(), direction(weight.detach())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history


def step_figure(history: list[ToyStep], step: int) -> Figure:
    """Left the rows of W' as arrows, in the middle m, right the loss; the target is dashed, W0 grey."""
    now, goal = history[step], magnitude(TARGET)
    weight = now.magnitude[:, None] * now.direction  # (3, 2)
    figure, (plane, bars, losses) = canvas(9.2, 3.2, 3, width_ratios=(1.1, 0.9, 1))
    for n, (colour, marker) in enumerate(zip(ROW_COLOURS, ROW_MARKERS, strict=True)):
        plane.plot([0, START[n, 0]], [0, START[n, 1]], color="0.75", lw=4, solid_capstyle="round")
        plane.plot([0, TARGET[n, 0]], [0, TARGET[n, 1]], color=colour, lw=1, ls="--")
        plane.plot(*TARGET[n].tolist(), marker, mec=colour, mfc="white", ms=9)
        path = torch.stack([s.magnitude[n] * s.direction[n] for s in history[: step + 1]])  # (step + 1, 2)
        plane.plot(path[:, 0], path[:, 1], color=colour, lw=0.8)
        plane.plot([0, weight[n, 0]], [0, weight[n, 1]], color=colour, lw=2.2)
        plane.plot(*weight[n].tolist(), marker, color=colour, ms=6)
        bars.bar(n, now.magnitude[n].item(), 0.6, color=colour)
        bars.plot([n - 0.4, n + 0.4], [goal[n], goal[n]], color="black", ls="--", lw=1.5)
        bars.plot([n - 0.4, n + 0.4], [history[0].magnitude[n]] * 2, color="0.6", lw=2)
    plane.set(xlim=(-1.9, 1.9), ylim=(-0.2, 2.3), aspect="equal", xlabel="input 1", ylabel="input 2")
    plane.set_title("rows of W′ (grey: W₀, dashed: target)", fontsize=9)
    bars.set(xticks=range(3), xticklabels=["row 1", "row 2", "row 3"], ylim=(0, 2.5))
    bars.set_title("m (grey: ‖W₀‖, dashed: target)", fontsize=9)
    log_axis(losses.yaxis, min(s.loss for s in history), max(s.loss for s in history))
    losses.plot([s.loss for s in history], color="0.6", lw=1.2)
    losses.plot(step, now.loss, "o", color="black", ms=7)
    losses.set_xlabel("step")
    losses.set_title(f"loss after step {step}: {now.loss:.4f}", fontsize=9)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.9, bottom=0.15, wspace=0.2)
    return figure


def step_alt(history: list[ToyStep], step: int) -> str:
    """Alt text of `step_figure`: loss, m, and each row's angle to its target."""
    now = history[step]
    m = ", ".join(f"{value:.2f}" for value in now.magnitude)
    goal = ", ".join(f"{value:.2f}" for value in magnitude(TARGET))
    cosine = (now.direction * direction(TARGET)).sum(dim=1).clamp(-1, 1)  # (3,)
    angles = ", ".join(f"{value:.0f}" for value in torch.rad2deg(cosine.acos()))
    return (
        f"A DoRA layer of three rows after step {step} of {len(history) - 1}: loss {now.loss:.4f}, at the start "
        f"{history[0].loss:.4f}; magnitudes {m}, target {goal}; degrees left between rows and target {angles}."
    )


def training_stepper(step: int = 10, learning_rate: float = 0.2) -> Panel:
    """Panel: step a toy DoRA fit forward and back → the rows of W', their magnitudes, the loss."""
    fits: dict[float, list[ToyStep]] = {}

    def draw(step: int, learning_rate: float) -> Drawing:
        if learning_rate not in fits:
            fits[learning_rate] = toy_fit(learning_rate)
        return Drawing(step_figure(fits[learning_rate], step), step_alt(fits[learning_rate], step))

    steps = slider(ipywidgets.IntSlider, "step", "Steps of gradient descent taken", value=step, min=0, max=STEPS)

    def move(by: int) -> None:
        steps.value = min(STEPS, max(0, steps.value + by))

    rates = slider(
        ipywidgets.SelectionSlider, "learning rate", "The fit is done anew", value=learning_rate, options=LEARNING_RATES
    )
    controls = {
        "step": steps,
        "back": button("step back", "One step of the fit back", lambda: move(-1)),
        "forward": button("step forward", "One step of the fit forward", lambda: move(1)),
        "learning_rate": rates,
    }
    return Panel(controls, draw)
