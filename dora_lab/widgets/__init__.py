"""ipywidgets panels for the chapters. Each is also a static figure with its alt text where there is no front end.

A panel's file holds its figure function (data → Figure), the alt text made from the same data, and the panel itself.
"""

from dora_lab.widgets.browser import results_browser
from dora_lab.widgets.detectable import difference_calculator
from dora_lab.widgets.direction import direction_explorer
from dora_lab.widgets.live import live_curves
from dora_lab.widgets.memory import memory_planner
from dora_lab.widgets.panel import Panel
from dora_lab.widgets.ranks import rank_explorer
from dora_lab.widgets.stepper import training_stepper

__all__ = [
    "Panel",
    "difference_calculator",
    "direction_explorer",
    "live_curves",
    "memory_planner",
    "rank_explorer",
    "results_browser",
    "training_stepper",
]
