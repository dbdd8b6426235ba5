"""The sweep: the same trials for every method, the best mean wins, what failed cannot."""

import pytest

from dora_lab.profiles import load_profile
from dora_lab.sweep import SWEEP, best_rates, read_sweep, run_sweep, sweep_specs


def _row(method, rate, seed, accuracy):
    return {"task": "boolq", "method": method, "learning_rate": rate, "seed": seed, "accuracy": accuracy}


def test_the_best_mean_wins_ties_go_to_the_lower_rate_and_a_failed_rate_is_out():
    rows = [_row("lora", 1e-3, s, a) for s, a in ((0, 0.6), (1, 0.8))]
    rows += [_row("lora", 3e-3, s, a) for s, a in ((0, 0.7), (1, 0.7))]
    rows += [_row("lora", 1e-2, s, a) for s, a in ((0, 0.9), (1, None))]
    assert best_rates(rows) == {("lora", "boolq"): 1e-3}


def test_methods_that_were_not_given_the_same_trials_are_not_compared():
    rows = [_row("lora", 1e-3, 0, 0.6), _row("lora", 3e-3, 0, 0.7), _row("dora", 1e-3, 0, 0.6)]
    with pytest.raises(ValueError, match="same trials on boolq"):
        best_rates(rows)
    with pytest.raises(ValueError, match="lower rates"):
        best_rates([_row("lora", 1e-3, 0, None)])


def test_a_sweep_gives_every_method_the_same_trials_on_validation_data(tiny_profile, tmp_path):
    profile = load_profile(tiny_profile)
    specs = [spec for spec in sweep_specs(profile, ["lora", "dora"]) if spec.task == "boolq"]
    assert {spec.split for spec in specs} == {"validation"} and len(specs) == 4
    rows = run_sweep(specs, tmp_path, jobs=2, report=lambda line: None)
    assert read_sweep(tmp_path / profile.name / SWEEP) == rows
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert set(best_rates(rows)) == {("lora", "boolq"), ("dora", "boolq")}

    said = []
    assert run_sweep(specs, tmp_path, report=said.append) == rows
    assert said == ["4 runs: 4 done before, 0 to do"]
    elsewhere = tmp_path / "elsewhere"
    assert run_sweep(specs, elsewhere, report=said.append, recorded=rows) == rows  # same run ids: nothing to do
    assert said[-1] == "4 runs: 4 done before, 0 to do" and not list(elsewhere.glob("*/*/record.json"))
