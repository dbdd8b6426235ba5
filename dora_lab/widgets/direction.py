"""The direction explorer: one row of a weight in the plane, taken apart into its length and its direction."""

import math

import ipywidgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc

from dora_lab.geometry import delta_direction, delta_magnitude
from dora_lab.widgets.panel import Drawing, Panel, canvas, slider

BASE, NOW, MOVE = "#000000", "#0072B2", "#D55E00"
BASE_LENGTH, BASE_ANGLE = 2.0, 30.0  # of w0; degrees


def row(length: float, angle: float) -> torch.Tensor:
    """A weight with one output feature and two inputs, (1, 2), from its length and its angle in degrees."""
    turn = math.radians(angle)
    return torch.tensor([[length * math.cos(turn), length * math.sin(turn)]], dtype=torch.float64)


def direction_figure(length: float, angle: float) -> Figure:
    """Left w0 and w in the plane, right where the move lies in (ΔD, ΔM). `angle` is from w0 to w, degrees."""
    start, now = row(BASE_LENGTH, BASE_ANGLE), row(length, BASE_ANGLE + angle)
    figure, (plane, moves) = canvas(8.4, 3.9, 2)
    grid = torch.linspace(0, 2 * math.pi, 200)
    plane.plot(BASE_LENGTH * grid.cos(), BASE_LENGTH * grid.sin(), color="0.75", ls=":", lw=1)
    _arrow(plane, start, BASE)
    _arrow(plane, now, NOW)
    first, last = sorted((BASE_ANGLE, BASE_ANGLE + angle))
    plane.add_patch(Arc((0, 0), 1.4, 1.4, theta1=first, theta2=last, color=MOVE, lw=2))
    for vector, name, colour in ((start, "w₀", BASE), (now, "w", NOW)):
        away = vector[0] / vector.norm() * (vector.norm() + 0.28)
        plane.text(*away.tolist(), name, color=colour, ha="center", va="center", fontsize=12)
    plane.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xlabel="input 1", ylabel="input 2")
    plane.set_title(f"length {length:.2f}, turned by {angle:.0f}°")
    moved_m, moved_d = delta_magnitude(now, start), delta_direction(now, start)
    moves.axhline(0, color="0.85", lw=1)
    moves.axvline(0, color="0.85", lw=1)
    moves.plot([0, moved_d], [0, moved_m], color=MOVE, lw=1, ls="--")
    moves.plot(0, 0, "s", color=BASE, ms=6)
    moves.plot(moved_d, moved_m, "o", color=NOW, ms=9)
    moves.set(xlim=(-0.1, 2.1), ylim=(-0.1, 2.1), xlabel="ΔD = 1 − cos(angle)", ylabel="ΔM = | ‖w‖ − ‖w₀‖ |")
    moves.set_title(f"ΔM = {moved_m:.2f}, ΔD = {moved_d:.3f}")
    figure.subplots_adjust(left=0.06, right=0.98, top=0.92, bottom=0.13, wspace=0.2)
    return figure


def direction_alt(length: float, angle: float) -> str:
    """Alt text of `direction_figure`: both vectors, ΔM and ΔD."""
    start, now = row(BASE_LENGTH, BASE_ANGLE), row(length, BASE_ANGLE + angle)
    return (
        f"Two arrows in the plane: w0 of length {BASE_LENGTH:.2f} at {BASE_ANGLE:.0f} degrees, w of length "
        f"{length:.2f} turned from it by {angle:.0f} degrees, w = ({now[0, 0]:.2f}, {now[0, 1]:.2f}). "
        f"ΔM = {delta_magnitude(now, start):.2f}, ΔD = {delta_direction(now, start):.3f}."
    )


def direction_explorer(length: float = 2.8, angle: float = 50.0) -> Panel:
    """Panel: sliders for the length of a vector and its turn from w0 → the picture, ΔM and ΔD."""
    controls = {
        "length": slider(
            ipywidgets.FloatSlider, "length ‖w‖", "Magnitude of the vector", value=length, min=0.1, max=3.2, step=0.1
        ),
        "angle": slider(
            ipywidgets.FloatSlider,
            "turn from w0 (degrees)",
            "Angle between w0 and w; moves the direction alone",
            value=angle,
            min=-180,
            max=180,
            step=5,
            readout_format=".0f",
        ),
    }
    return Panel(controls, lambda length, angle: Drawing(direction_figure(length, angle), direction_alt(length, angle)))


def _arrow(axes: Axes, vector: torch.Tensor, colour: str) -> None:
    arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", vector[0].tolist(), (0, 0), arrowprops=arrow)
