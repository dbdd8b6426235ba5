"""Training curves of the runs in a folder, while they go on and afterwards."""

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets
from matplotlib.figure import Figure

from dora_lab.files import read_lines
from dora_lab.profiles import PROJECT
from dora_lab.records import LIVE_CURVE, is_done
from dora_lab.widgets.panel import LABEL_WIDTH, WIDE, Drawing, Panel, button, canvas, log_axis

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
SHOWN = len(COLOURS)


def read_curve(folder: Path) -> list[dict]:
    """Rows with step, loss and learning rate of one run; of a run that goes on, every row it has logged so far.

    Empty before the first. A line that is being written at this moment is left for the next look.
    """
    if (folder / "curve.jsonl").is_file():
        return read_lines(folder / "curve.jsonl")
    rows = []
    with contextlib.suppress(OSError, ValueError):  # not there yet, gone since, or half a line at its end
        for line in (folder / LIVE_CURVE).read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


def run_states(runs_dir: Path) -> dict[str, str]:
    """{folder of a run, relative to `runs_dir`: "done" or "going on"} of all runs with a curve; the newest first."""
    changed: dict[Path, float] = {}
    for path in (*runs_dir.glob("**/curve.jsonl"), *runs_dir.glob(f"**/{LIVE_CURVE}")):
        with contextlib.suppress(OSError):  # a curve whose run has just ended
            changed[path.parent] = max(changed.get(path.parent, 0.0), path.stat().st_mtime)
    newest = sorted(changed, key=lambda folder: (-changed[folder], folder))
    return {str(folder.relative_to(runs_dir)): "done" if is_done(folder) else "going on" for folder in newest}


def curves_figure(curves: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Loss against step, one line a run; `curves`: name → rows of `read_curve`."""
    figure, (axes,) = canvas(7.6, 3.4)
    for index, (name, rows) in enumerate(curves.items()):
        look = {"color": COLOURS[index % SHOWN], "ls": STYLES[index % len(STYLES)], "label": name}
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], lw=1.6, **look)
    axes.set(xlabel="step", ylabel="loss per answer token (nats)")
    if any(curves.values()):
        losses = [row["loss"] for rows in curves.values() for row in rows]
        log_axis(axes.yaxis, min(losses), max(losses))
        axes.legend(frameon=False, fontsize=7)
    else:
        axes.text(0.5, 0.5, "no run with a curve yet", transform=axes.transAxes, ha="center")
    figure.subplots_adjust(left=0.1, right=0.98, top=0.96, bottom=0.15)
    return figure


def curves_alt(curves: Mapping[str, Sequence[Mapping]]) -> str:
    """Alt text of `curves_figure`: where every run began and how far it is."""
    parts = [
        f"{name}: {rows[0]['loss']:.3f} at step {rows[0]['step']}, {rows[-1]['loss']:.3f} at step {rows[-1]['step']}"
        for name, rows in curves.items()
        if rows
    ]
    return f"Training loss against step. {'; '.join(parts) or 'No run with a curve yet'}."


def live_curves(runs_dir: str | Path = PROJECT / "runs", every_s: float = 2.0) -> Panel:
    """Panel: curves of the runs below `runs_dir`; a button looks again, a checkbox does so every `every_s` seconds.

    A run that goes on shows its curve as far as it has logged it. The timer needs a running event loop, which a kernel
    has; without one the checkbox stays off.
    """
    runs_dir = Path(runs_dir)
    choice = ipywidgets.SelectMultiple(
        description="runs",
        tooltip=f"Runs to draw, {SHOWN} at most; hold Ctrl or Shift with the arrow keys to choose several",
        rows=6,
        style=LABEL_WIDTH,
        layout=WIDE,
    )
    timer = ipywidgets.Checkbox(
        value=False,
        description=f"look again every {every_s:g} s",
        tooltip="Read the files again as long as this is ticked",
    )
    offered: list[str] = []

    def offer() -> None:
        states = run_states(runs_dir)
        new = [name for name in states if name not in offered and offered]
        kept = [name for name in choice.value if name in states]
        offered[:] = states
        choice.options = [(f"{name} ({state})", name) for name, state in states.items()]
        choice.value = tuple([*new, *kept][:SHOWN]) or tuple(offered[:2])

    def draw(runs: tuple[str, ...], timer: bool) -> Drawing:
        curves = {name: read_curve(runs_dir / name) for name in runs[:SHOWN]}
        return Drawing(curves_figure(curves), curves_alt(curves))

    def look() -> None:
        panel.held(offer)

    async def keep_looking() -> None:
        while timer.value:
            await asyncio.sleep(every_s)
            if timer.value:
                look()

    tasks: list[asyncio.Task] = []  # a task that nothing holds may be collected

    def switched(change) -> None:
        if not change["new"]:
            return
        try:
            tasks[:] = [asyncio.get_running_loop().create_task(keep_looking())]
        except RuntimeError:
            timer.value = False

    offer()
    panel = Panel({"runs": choice, "refresh": button("look again", "Read the files again", look), "timer": timer}, draw)
    timer.observe(switched, names="value")
    return panel
