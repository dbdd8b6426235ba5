"""What all panels share: labelled controls above a picture that is drawn anew whenever one of them changes.

A panel shows itself as HTML with the picture and, to a front end, as a widget in the same output, which the front end
prefers. A notebook that is run headless has the first alone, and so has a page printed from either.
"""

import base64
import contextlib
import gc
import html
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets
import matplotlib
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dora_lab.figures import STYLE

LABEL_WIDTH = {"description_width": "11em"}
WIDE = ipywidgets.Layout(width="36em", max_width="100%")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Drawing:
    """What a panel shows for one setting of its controls: a figure, its alt text, and HTML to stand below it."""

    figure: Figure
    alt: str
    below: str = ""


class Panel:
    """Controls, and `draw(**{name: value})`, called with the value of every control that has one.

    `alt`, `image_html` and `below` are what is shown now; `widget` is the whole for a front end. Everything that
    changes is kept here, so that two panels on a page do not meet.
    """

    def __init__(self, controls: Mapping[str, ipywidgets.Widget], draw: Callable[..., Drawing]):
        self.controls = dict(controls)
        self._draw = draw
        self.alt = self.image_html = self.below = ""
        self._picture = ipywidgets.HTML()
        self._held = False
        for control in self.controls.values():
            if hasattr(control, "value"):
                control.observe(self._changed, names="value")
        self.widget = ipywidgets.VBox([*self.controls.values(), self._picture])
        self.refresh()

    def values(self) -> dict[str, Any]:
        """The value of every control that has one."""
        return {name: control.value for name, control in self.controls.items() if hasattr(control, "value")}

    def set(self, **values: Any) -> None:
        """Give several controls their values and draw once. Raises KeyError for a control that the panel has not."""
        self.held(lambda: [setattr(self.controls[name], "value", value) for name, value in values.items()])

    def held(self, change: Callable[[], object]) -> None:
        """Call `change`, which may give controls other values or options, and draw once when it is done."""
        self._held = True
        try:
            change()
        finally:
            self._held = False
        self.refresh()

    def refresh(self) -> None:
        """Draw with the present values."""
        with _garbage_kept():
            drawing = self._draw(**self.values())
            self.alt, self.below = drawing.alt, drawing.below
            self.image_html = _image(drawing.figure, drawing.alt)
            self._picture.value = self.image_html + self.below

    def _changed(self, _: Mapping) -> None:
        if not self._held:
            self.refresh()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        static = {"text/plain": self.alt, "text/html": self.image_html + self.below}
        if not has_front_end():
            return static
        return static | {WIDGET_VIEW: {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}}


def has_front_end() -> bool:
    """Whether someone looks at the page that is run: a front end names the cell in its request, papermill does not."""
    kernel = getattr(get_ipython(), "kernel", None)
    request = kernel.get_parent("shell") if kernel else None
    return bool(request and request.get("metadata", {}).get("cellId")) or "COLAB_RELEASE_TAG" in os.environ


def canvas(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure in the house's style and its axes in one row; inches. `options` go to `Figure.subplots`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for panel in axes:
        panel.locator_params(nbins=4)  # ticks cost more than all else that is drawn
    return figure, list(axes)


def log_axis(axis: Axis, low: float, high: float) -> None:
    """Make an axis logarithmic, with ticks at the powers of ten around `low` to `high` and no others."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    first, last = math.floor(math.log10(max(low, high * 1e-12)) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    axis.set_ticks([10.0**power for power in range(first, last + 1)])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def slider(kind: type[ipywidgets.Widget], label: str, tooltip: str, **options: Any) -> ipywidgets.Widget:
    """A slider of `kind` with its label, its tooltip and room for both; it answers to the arrow keys."""
    return kind(description=label, tooltip=tooltip, style=LABEL_WIDTH, layout=WIDE, **options)


def button(label: str, tooltip: str, pressed: Callable[[], None]) -> ipywidgets.Button:
    """A button that calls `pressed` without arguments."""
    made = ipywidgets.Button(description=label, tooltip=tooltip)
    made.on_click(lambda _: pressed())
    return made


def table_html(header: list[str], rows: list[list[str]]) -> str:
    """A plain HTML table; every cell is escaped."""
    head = "".join(f'<th scope="col" style="text-align:left">{html.escape(cell)}</th>' for cell in header)
    lines = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Let a due garbage collection wait: beside PyTorch it takes longer than a drawing, and figures call for many."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _image(figure: Figure, alt: str) -> str:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100, metadata={"Software": None}, pil_kwargs={"compress_level": 1})
    data = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}" style="max-width:100%">'
