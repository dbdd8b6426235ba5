"""The memory planner's panel: every control changes figure and text, bad choices are said, no front end is needed."""

import base64
import re

import pytest

from dora_lab.memory import plan
from dora_lab.shapes import SHAPES
from dora_lab.widgets import panel
from dora_lab.widgets.memory import memory_planner

CHANGES = {
    "model": "llama3-8b",
    "method": "dora-peft",
    "precision": "nf4",
    "optimizer": "paged-adamw",
    "rank": 128,
    "batch": 32,
    "length": 1024,
    "checkpointing": False,
    "dropout": False,
    "gigabytes": 16,
}


@pytest.fixture
def made():
    return memory_planner()


def test_every_control_is_tested_and_has_a_label_and_a_tooltip(made):
    assert set(made.controls) == set(CHANGES)
    for control in made.controls.values():
        assert control.description and control.tooltip


@pytest.mark.parametrize("name", CHANGES)
def test_each_control_changes_what_is_shown(made, name):
    made.set(checkpointing=True, length=128 if name == "dropout" else 512)
    if name == "dropout":  # what it keeps counts where all is kept
        made.controls["checkpointing"].value = False
    before = made.image_html + made.alt + made.below
    made.controls[name].value = CHANGES[name]
    assert made.image_html + made.alt + made.below != before
    assert made.widget.children[-1].value == made.image_html + made.below


def test_what_it_shows_is_the_plan(made):
    made.set(precision="nf4", batch=8)
    total = plan(SHAPES["llama-7b"], base_precision="nf4", batch=8).total
    assert f"{total / 1e9:.1f} GB (weights 4.2" in made.alt
    assert "fits on 40 GB, whatever the number of examples" in made.below and "a single change" in made.below
    made.set(checkpointing=False, length=512, batch=64)
    assert "are not enough" in made.below and "gradient checkpointing" in made.below


def test_a_choice_that_makes_no_run_is_said_and_can_be_undone(made):
    made.set(method="full", precision="nf4")
    assert "cannot be trained in full" in made.alt and made.below == ""
    made.set(model="mini-world", method="dora", rank=128)
    assert "GB (" in made.alt
    made.controls["method"].value = "lora"
    assert "LoRA" in made.alt


def test_two_panels_share_nothing(made):
    other = memory_planner("llama-13b")
    before = other.image_html
    made.controls["batch"].value = 3
    assert other.image_html == before


def test_without_a_front_end_the_picture_and_the_text_remain(made, monkeypatch):
    monkeypatch.setattr(panel, "has_front_end", lambda: False)
    bundle = made._repr_mimebundle_()
    assert bundle == {"text/html": made.image_html + made.below, "text/plain": made.alt}
    monkeypatch.setattr(panel, "has_front_end", lambda: True)
    assert made._repr_mimebundle_()[panel.WIDGET_VIEW]["model_id"] == made.widget.model_id
    found = re.search(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', made.image_html)
    assert base64.b64decode(found[2]).startswith(b"\x89PNG")


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="unknown model 'gpt2'"):
        memory_planner("gpt2")
