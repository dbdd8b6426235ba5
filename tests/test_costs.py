"""The benchmark's table and figures: ratios to LoRA, from rows made by hand."""

import json
from dataclasses import asdict

import pandas as pd
import pytest

from dora_lab.bench import Setting
from dora_lab.costs import (
    cost_dots,
    cost_dots_alt,
    cost_ratios,
    cost_table,
    norm_lines,
    norm_lines_alt,
    read_costs,
    write_costs,
)


@pytest.fixture
def found():
    setting = asdict(Setting(4, 64))
    times = {"step_to_lora": 1.0, "step_to_lora_low": 1.0, "step_to_lora_high": 1.0}
    rows = [{"setting": setting, "variant": "lora", "saved_bytes": 1000, "peak_bytes": 2000} | times]
    times = {"step_to_lora": 1.25, "step_to_lora_low": 1.2, "step_to_lora_high": 1.5, "evaluation_to_lora": 1.1}
    rows.append(
        {"setting": setting, "variant": "dora", "saved_bytes": 1210, "peak_bytes": 2100, "norms_per_step": 1} | times
    )
    rows.append({"setting": setting, "variant": "dora-merged", "evaluation_to_lora": 0.9})
    norms = [{"out": 8, "in": 4, "rank": r, "dense_s": 2.0, "factored_s": time} for r, time in ((1, 1.0), (4, 3.0))]
    environment = {"date": "2026-01-02T03:04:05", "device": "a processor", "system": "Linux", "threads": 2}
    environment["versions"] = {"torch": "1", "transformers": "2", "peft": "3"}
    return {"environment": environment, "turns": 3, "rows": rows, "norms": norms}


def test_every_number_is_a_ratio_to_lora_in_the_same_setting(found):
    table = cost_ratios(found).set_index("variant")
    assert table.loc["dora", ["step", "saved", "peak"]].tolist() == [1.25, 1.21, 1.05]
    assert table.loc["lora", ["step", "saved", "peak"]].tolist() == [1, 1, 1]
    assert pd.isna(table.loc["dora-merged", "step"]) and table.loc["dora-merged", "evaluation"] == 0.9


def test_what_was_not_measured_is_left_empty(found, tmp_path):
    shown = cost_table(found).set_index("variant")
    assert shown.loc["DoRA", "training step"] == "1.25 (1.20 to 1.50)"
    assert shown.loc["DoRA, merged", "training step"] == shown.loc["DoRA, merged", "saved bytes"] == ""
    table, text = write_costs(found, tmp_path)
    assert pd.read_csv(table)["step"].tolist()[:2] == [1.0, 1.25]
    assert "2026-01-02" in text.read_text() and "1.25 (1.20 to 1.50)" in text.read_text()


def test_figures_say_their_numbers_in_words(found):
    assert "DoRA: training step 1.25 to 1.25, evaluation 1.10 to 1.10, saved bytes 1.21" in cost_dots_alt(found)
    assert "8 x 4: 0.50 at rank 1, 1.50 at rank 4" in norm_lines_alt(found)
    assert len(cost_dots(found).axes) == 3 and len(norm_lines(found).axes[0].lines) == 2


def test_a_missing_or_foreign_file_is_named(found, tmp_path):
    path = tmp_path / "bench.json"
    with pytest.raises(ValueError, match=r"no benchmark at .*bench.json: run `dora-lab bench"):
        read_costs(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="broken JSON"):
        read_costs(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no benchmark of this version"):
        read_costs(path)
    path.write_text(json.dumps(found))
    assert read_costs(path) == found
