"""The benchmark: what it counts, on a Llama of one small layer. Times are not looked at."""

from dataclasses import asdict

import pytest
import torch

from dora_lab import bench
from dora_lab.bench import EVALUATED, VARIANTS, Setting, build, make_step, run


def test_every_variant_is_measured_and_the_norm_is_taken_once_a_step():
    setting = Setting(2, 16, accumulation=2, hidden=64, layers=1, rank=4)
    found = run((setting,), turns=2, report=lambda line: None, norm_shapes=((64, 32),))
    rows = {row["variant"]: row for row in found["rows"]}
    assert tuple(rows) == EVALUATED
    assert rows["dora"]["norms_per_step"] == 1 and rows["lora"]["norms_per_step"] is None
    assert rows["base"]["saved_bytes"] < rows["lora"]["saved_bytes"] < rows["dora"]["saved_bytes"]
    assert rows["dora"]["saved_bytes"] < rows["dora-peft"]["saved_bytes"]
    assert all(rows[name]["peak_bytes"] >= rows[name]["saved_bytes"] for name in VARIANTS)
    assert rows["lora"]["step_to_lora"] == rows["lora"]["evaluation_to_lora"] == 1
    assert "step_to_lora" not in rows["dora-merged"]
    assert [(row["rank"], row["out"], row["in"]) for row in found["norms"]] == [(4, 64, 32), (16, 64, 32)]


def test_what_an_interrupted_measurement_finished_is_not_measured_again(tmp_path, monkeypatch):
    settings, partial = (Setting(1, 4), Setting(1, 8)), tmp_path / "bench.partial"
    measured = []

    def measure(setting, turns, device):
        measured.append(setting)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [{"setting": asdict(setting), "variant": "lora", "step_to_lora": 1.0}]

    monkeypatch.setattr(bench, "measure", measure)
    options = {"turns": 2, "report": lambda line: None, "norm_shapes": ((8, 8),), "partial": partial}
    with pytest.raises(KeyboardInterrupt):
        run(settings, **options)
    found = run(settings, **options)
    assert measured == [settings[0], settings[1], settings[1]]
    assert [row["setting"]["length"] for row in found["rows"]] == [4, 8]
    run(settings, **options | {"turns": 3})  # another measurement
    assert measured[3:] == list(settings)


@pytest.mark.parametrize("variant", ["lora", "dora", "dora-peft", "dora-peft-sped-up"])
def test_a_step_on_a_base_in_nf4(variant):
    setting = Setting(1, 8, hidden=64, layers=1, rank=4, precision="nf4")
    model = build(variant, setting)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    make_step(model, setting)()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_an_unknown_variant_or_precision_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'qdora'"):
        build("qdora", Setting(1, 4))
    with pytest.raises(ValueError, match="unknown precision 'int3'"):
        build("dora", Setting(1, 4, precision="int3"))
