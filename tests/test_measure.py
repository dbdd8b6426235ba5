"""Measuring a whole model's training beside its plan, on the mini-world's shape. Times are not looked at."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_lab import measure, measured
from dora_lab.measure import VARIANTS, Workload

SMALL = Workload("mini-world", rank=4, batch=4, length=128, dtype="float32")


def test_every_variant_has_a_peak_a_plan_and_a_speed(tmp_path):
    said = []
    found = measure.measure(SMALL, steps=2, report=said.append)
    rows = {row["variant"]: row for row in found["rows"]}
    assert tuple(rows) == tuple(VARIANTS) and len(said) == len(VARIANTS)
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(4 * 128 / row["step_median_s"])
        assert row["planned_bytes"] == sum(row["planned_parts"].values())
    for name in ("lora", "dora"):
        assert 0.9 < rows[name]["planned_to_measured"] < 1.1
    assert rows["dora"]["peak_bytes"] < rows["dora-peft"]["peak_bytes"]
    measured.write(found, tmp_path / "gpu" / "found.json")
    assert json.loads((tmp_path / "gpu" / "found.json").read_text())["workload"]["model"] == "mini-world"


def test_only_the_labelled_positions_go_through_the_output_layer():
    (row,) = measure.measure(
        Workload("mini-world", rank=4, batch=4, length=128, dtype="float32", logit_columns=8), ("dora",), 2, str
    )["rows"]
    assert row["planned_parts"]["logits"] <= 3 * 4 * 4 * 8 * 986 + 8 * 4 * 8
    assert 0.9 < row["planned_to_measured"] < 1.1


def test_a_variant_that_does_not_fit_is_recorded_as_such(monkeypatch):
    def build(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(measure, "build", build)
    (row,) = measure.measure(SMALL, ("dora-peft",), report=str)["rows"]
    assert row["error"] == "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)" and "peak_bytes" not in row


def test_what_an_interrupted_measurement_finished_is_not_measured_again(tmp_path, monkeypatch):
    called = []

    def measure_one(name, workload, steps):
        called.append(name)
        if len(called) == 2:
            raise KeyboardInterrupt
        return {"variant": name, "error": "out of memory (made up)", "planned_bytes": 1}

    monkeypatch.setattr(measure, "_measure_one", measure_one)
    options = {"variants": ("lora", "dora"), "report": str, "partial": tmp_path / "llama-7b.partial"}
    with pytest.raises(KeyboardInterrupt):
        measure.measure(SMALL, steps=2, **options)
    found = measure.measure(SMALL, steps=2, **options)
    assert called == ["lora", "dora", "dora"] and [row["variant"] for row in found["rows"]] == ["lora", "dora"]
    measure.measure(SMALL, steps=3, **options)  # another measurement
    measure.measure(replace(SMALL, batch=2), steps=3, **options)
    assert called[3:] == ["lora", "dora"] * 2


@pytest.mark.parametrize("text", ["", "[", "{}", '{"rows": []}'])
def test_what_is_no_measurement_is_not_gone_on_with(tmp_path, text):
    partial = tmp_path / "x.partial"
    partial.write_text(text)
    assert measured.finished_rows(partial, {"environment": {"date": "now"}, "rows": []}) == []


def test_what_is_unknown_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'full': choose one of lora, dora, qdora, dora-peft"):
        measure.measure(SMALL, ("full",))
    with pytest.raises(ValueError, match="unknown model 'llama-8b': choose one of"):
        measure.measure(Workload("llama-8b"))


def test_from_the_command_line(tmp_path):
    command = [str(Path(sys.executable).with_name("dora-lab")), "measure-7b", str(tmp_path / "found.json")]
    command += ["--model", "mini-world", "--rank", "4", "--batch", "2", "--length", "32", "--steps", "1"]
    done = subprocess.run([*command, "--variant", "lora"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lora: " in done.stdout and "tokens/s" in done.stdout
    assert [row["variant"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]] == ["lora"]
    assert not (tmp_path / "found.partial").exists()
    refused = subprocess.run([*command, "--variant", "full"], capture_output=True, text=True)
    assert refused.returncode == 2 and "unknown variant 'full'" in refused.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_llama_7b_fits_as_planned_under_40_gb():
    rows = measure.measure(Workload(), ("lora", "dora", "qdora"), 3)["rows"]
    assert all(0.9 < row["planned_to_measured"] < 1.1 for row in rows)
    assert rows[1]["peak_bytes"] <= 24e9 and rows[2]["peak_bytes"] <= 12e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cap_above_the_gpus_memory_is_refused():
    with pytest.raises(ValueError, match="give a cap of at most that, not 1e"):
        measure.measure(Workload("mini-world", cap_gb=1e6), ("lora",))
