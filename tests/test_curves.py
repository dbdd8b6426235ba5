"""Curves: what is drawn and what the alt text says are the numbers that were given."""

import pytest
from made_records import make_records

from dora_lab.curves import SKILL_NAMES, accuracy_by_rank, accuracy_by_rank_alt, skill_curves, skill_curves_alt

PRETRAINING = {
    "stages": [{"name": "statements", "steps": 150}, {"name": "questions", "steps": 250}],
    "skills": [
        {"step": step, "stage": "statements", **{kind: i / 10 + step / 4000 for i, kind in enumerate(SKILL_NAMES)}}
        for step in (200, 400)
    ]
    + [{"step": 600, "stage": "questions", **dict.fromkeys(SKILL_NAMES, 0.95)}],
}


def test_skills_are_drawn_as_given_and_the_stages_where_they_start():
    axes = skill_curves(PRETRAINING).axes[0]
    drawn = {
        line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label() in SKILL_NAMES.values()
    }
    for kind, name in SKILL_NAMES.items():
        assert drawn[name] == [row[kind] for row in PRETRAINING["skills"]]
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("statements", 0), ("questions", 150)]


def test_the_alt_text_says_when_a_skill_formed():
    text = skill_curves_alt(PRETRAINING)
    assert "600 pretraining steps" in text and text.count("first above 0.9 at step 600") == len(SKILL_NAMES)
    low = {**PRETRAINING, "skills": PRETRAINING["skills"][:2]}
    assert "never above 0.9" in skill_curves_alt(low)


def test_accuracy_is_drawn_at_its_rank():
    records = make_records((("lora", 1), ("lora", 4), ("dora", 4), ("full", None)))
    panels = accuracy_by_rank(records).axes
    assert [panel.get_title() for panel in panels] == ["BoolQ", "HellaSwag", "WinoGrande"]
    mean = {}
    for record in records:
        mean.setdefault((record.spec.task, record.spec.method, record.spec.rank), []).append(record.result.accuracy)
    mean = {key: 100 * sum(values) / len(values) for key, values in mean.items()}
    lora, dora = (container.lines[0] for container in panels[0].containers)
    assert list(lora.get_xdata()) == [1, 4] and list(dora.get_xdata()) == [4]
    assert list(lora.get_ydata()) == pytest.approx([mean["boolq", "lora", 1], mean["boolq", "lora", 4]])
    assert f"BoolQ LoRA: {mean['boolq', 'lora', 1]:.1f} at rank 1" in accuracy_by_rank_alt(records)
