"""Chapter 14's tables and figures: what is counted, what is compared, and what may be said of it."""

from types import SimpleNamespace

import numpy as np
import pytest

from dora_lab import hybrids
from dora_lab.adapter_config import layer_of
from dora_lab.adapters import adapted_modules, attach
from dora_lab.hybrid_figures import (
    accuracy_for_parameters,
    accuracy_for_parameters_alt,
    worth_maps,
    worth_maps_alt,
)
from dora_lab.hybrid_tables import (
    ONE_SEED,
    accuracy_table,
    contrast_intervals,
    contrast_table,
    contrasts,
    method_table,
    points_of,
    run_name,
    verdicts,
    write_hybrids,
)
from dora_lab.hybrids import MAGNITUDE, UPDATE, Part
from dora_lab.models import load_model
from dora_lab.pipeline import RECORDED, answers_of, of_profile
from dora_lab.profiles import PROJECT, load_profile
from dora_lab.records import read_records
from dora_lab.specs import RunSpec

TASKS = ("boolq", "hellaswag", "winogrande")


def record(task, method, rank, variant, seed, accuracy, parameters, split="test"):
    spec = SimpleNamespace(task=task, method=method, rank=rank, variant=variant, seed=seed, split=split)
    return SimpleNamespace(spec=spec, result=SimpleNamespace(accuracy=accuracy, trainable_parameters=parameters))


def records():
    kinds = (("lora", 1, None, 0.7, 100), ("lora", 2, None, 0.75, 200), ("dora", 2, None, 0.8, 250))
    kinds += (("dora-magnitude", None, None, 0.6, 50), ("dora", 2, "table6", 0.78, 150))
    return [
        record(task, method, rank, variant, seed, accuracy + 0.01 * seed, parameters)
        for task in TASKS
        for method, rank, variant, accuracy, parameters in kinds
        for seed in (0, 1, 2)
    ]


def test_points_are_kinds_of_run_in_the_order_of_what_they_train():
    extra = [record("boolq", "lora", 1, None, 9, 0.1, 100), record("boolq", "lora", 1, None, 0, 0.1, 100, "validation")]
    points = points_of(records() + extra, seeds=(0, 1, 2))
    names = ["DoRA (m only)", "LoRA, rank 1", "table6", "LoRA, rank 2", "DoRA, rank 2"]
    assert list(dict.fromkeys(point.name for point in points)) == names
    table6 = next(point for point in points if point.name == "table6")
    assert table6.accuracy == {0: 78.0, 1: 79.0, 2: 80.0} and table6.interval.estimate == pytest.approx(79)
    shown = accuracy_table(points)
    assert list(shown["run"]) == names and list(shown["parameters"]) == [50, 100, 150, 200, 250]
    assert shown.loc[2, "BoolQ"] == "79.0 ± 2.5" and shown.loc[2, "mean"] == "79.0" and set(shown["seeds"]) == {3}


def test_a_task_that_was_not_run_is_said_and_leaves_no_mean():
    points = points_of([r for r in records() if r.spec.task != "boolq" or r.spec.variant is None], seeds=(0,))
    row = accuracy_table(points).set_index("run").loc["table6"]
    assert (row["BoolQ"], row["HellaSwag"], row["mean"]) == ("not run", "78.0", "")


def test_runs_of_one_name_that_train_different_numbers_are_refused():
    with pytest.raises(ValueError, match=r"runs named 'table6' on boolq train \[150, 151\] parameters: .*not one kind"):
        points_of([*records(), record("boolq", "dora", 2, "table6", 2, 0.8, 151)], seeds=(0, 1, 2))


# --- What may be said ---


def answers(shares, seeds):
    """Answers to 100 questions of which a share is right, the same questions for every name."""
    return {
        (task, name): {seed: {str(i): bool(i < 100 * share + seed) for i in range(100)} for seed in range(seeds)}
        for task in TASKS
        for name, share in shares.items()
    }


def test_comparisons_are_said_by_p_after_holm():
    shares = {"better": 0.9, "same": 0.5, "worse": 0.3, "DoRA, rank 2": 0.5}
    pairs = contrasts(["better", "same", "worse"], 2)
    table = contrast_table(answers(shares, 3), pairs, TASKS)
    assert list(table["said"]) == ["higher", "no difference shown", "lower"]
    assert list(table["points"]) == pytest.approx([40, 0, -20])
    assert (table["p (Holm)"] >= table["p"]).all()
    lines = verdicts(table)
    assert lines[0].startswith("better minus DoRA, rank 2: +40.0 points") and lines[0].endswith("higher.")
    assert lines[-1] == "Of 3 comparisons 1 came out higher, 1 lower, 1 neither."
    assert contrast_intervals(table)["worse minus DoRA, rank 2"].estimate == pytest.approx(-0.2)


def test_one_seed_says_nothing_of_methods():
    table = contrast_table(answers({"better": 0.9, "DoRA, rank 2": 0.5}, 1), contrasts(["better"], 2), TASKS)
    assert list(table["said"]) == [ONE_SEED] and np.isnan(table.loc[0, "p (Holm)"])
    assert verdicts(table) == [f"better minus DoRA, rank 2: +40.0 points, 95 % interval "
                               f"{table.loc[0, 'low']:+.1f} to {table.loc[0, 'high']:+.1f}, {ONE_SEED}."]  # fmt: skip


def test_a_comparison_that_lacks_a_task_is_left_out():
    found = answers({"better": 0.9, "DoRA, rank 2": 0.5}, 2)
    del found["boolq", "better"]
    table = contrast_table(found, contrasts(["better"], 2), TASKS)
    assert table.empty and verdicts(table) == []


def test_the_rule_is_compared_with_its_control_and_its_budget():
    pairs = contrasts(["gradient", "lora-pissa"], 2)
    assert ("gradient", "shuffled") in pairs.values() and ("gradient", "DoRA, rank 1") in pairs.values()
    assert ("lora-pissa", "LoRA, rank 2") in pairs.values() and len(pairs) == 5


def test_the_page_has_the_table_and_the_verdicts(tmp_path):
    points = points_of(records(), (0, 1, 2))
    table = contrast_table(answers({"table6": 0.9, "DoRA, rank 2": 0.5}, 3), contrasts(["table6"], 2), TASKS)
    page = write_hybrids(points, table, tmp_path / "new", "Runs for a test").read_text()
    assert "| table6 | 150 | 79.0 ± 2.5 | 79.0 ± 2.5 | 79.0 ± 2.5 | 79.0 | 3 |" in page
    assert "Runs for a test." in page and all(f"- {line}\n" in page for line in verdicts(table))


@pytest.mark.slow
def test_the_committed_page_is_what_the_recorded_runs_say(tmp_path):
    profile, plain = load_profile("mini-hybrids"), load_profile("mini")
    references = [r for r in of_profile(plain, read_records(RECORDED / plain.name)[0]) if r.spec.method != "full"]
    runs = [r for r in of_profile(profile, read_records(RECORDED / profile.name)[0]) if r.spec.variant]
    found = answers_of(RECORDED, [*references, *runs], run_name)
    table = contrast_table(found, contrasts(profile.variants, profile.rank), profile.tasks)
    page = write_hybrids(points_of([*references, *runs], profile.seeds), table, tmp_path, "x").read_text()
    committed = (PROJECT / "figures" / "hybrids.md").read_text()
    assert page.splitlines()[4:] == committed.splitlines()[4:], "figures/hybrids.md is out of date: run chapter 14"


# --- Figures ---


def parts():
    names = [f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    return [Part(n, k, 10 if k == UPDATE else 5, 1.0 + i) for i, n in enumerate(names) for k in (UPDATE, MAGNITUDE)]


def test_heat_maps_frame_what_was_taken_and_say_so():
    methods = hybrids.choose_methods(parts(), 30)
    figure = worth_maps(parts(), methods)
    frames = [sum(patch.get_edgecolor()[0] > 0.5 for patch in axis.patches) for axis in figure.axes[:2]]
    assert frames == [1, 4] and hybrids.parameters_of(methods, parts()) == 30
    alt = worth_maps_alt(parts(), methods)
    # 1 to 4 of all gain, 20, for 10 parameters of an update and 5 of a magnitude
    assert "update (A and B): 500.00 to 2000.00, most in up_proj of layer 1; 1 of 4 modules taken" in alt
    assert "magnitude m: 1000.00 to 4000.00, most in up_proj of layer 1; 4 of 4 modules taken" in alt


def test_the_method_table_is_layers_by_modules():
    table = method_table(
        {"a.0.q_proj": "dora", "a.0.up_proj": "frozen", "a.1.q_proj": "lora", "a.1.up_proj": "dora-magnitude"}
    )
    assert table.to_dict() == {"q_proj": {0: "DoRA", 1: "LoRA"}, "up_proj": {0: "frozen", 1: "m"}}
    assert layer_of("model.layers.11.mlp.up_proj") == 11
    with pytest.raises(ValueError, match="module 'lm_head' has no layer number"):
        layer_of("lm_head")


def test_every_point_is_drawn_and_told():
    points = points_of(records(), (0, 1, 2))
    figure, alt = accuracy_for_parameters(points), accuracy_for_parameters_alt(points)
    assert [axis.get_title() for axis in figure.axes] == ["BoolQ", "HellaSwag", "WinoGrande"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(labels) == {"LoRA", "DoRA", "DoRA (m only)", "table6"}
    assert alt.count("table6 79.0 (76.5 to 81.5) for 150") == 3 and "LoRA, rank 1 71.0" in alt


# --- The profile ---


def methods_of(variant: str, names) -> dict[str, str]:
    config = RunSpec.from_profile(load_profile("mini-hybrids"), "boolq", "dora", variant=variant).adapter_config
    own = {name: config.of_module(name) for name in names}
    return {name: one.method if one else "frozen" for name, one in own.items()}


def test_the_profiles_control_is_its_choice_shuffled_at_the_same_price():
    spec = RunSpec.from_profile(load_profile("mini"), "boolq", "dora")
    modules = adapted_modules(attach(load_model(spec.base_model), spec.adapter_config))
    parts = [
        Part(name, kind, count, 0.0)
        for name, module in modules.items()
        for kind, count in (
            (UPDATE, module.lora_A.numel() + module.lora_B.numel()),
            (MAGNITUDE, module.magnitude.numel()),
        )
    ]
    chosen, control = methods_of("gradient", modules), methods_of("shuffled", modules)
    assert hybrids.shuffled(chosen, parts, 0) == control != chosen
    spent, budget = hybrids.parameters_of(chosen, parts), hybrids.budget_of_rank_1(parts, spec.rank)
    assert spent == hybrids.parameters_of(control, parts) and 0.99 * budget < spent <= budget


@pytest.mark.slow
def test_the_profiles_choice_is_the_rules():
    profile = load_profile("mini")
    parts = hybrids.pooled([hybrids.measure_run(RunSpec.from_profile(profile, t, "dora")) for t in profile.tasks])
    chosen = hybrids.choose_methods(parts, hybrids.budget_of_rank_1(parts, profile.rank))
    recorded = methods_of("gradient", chosen)
    assert sum(recorded[name] != method for name, method in chosen.items()) <= 1  # another machine rounds otherwise


def test_a_variant_is_called_by_its_name_and_a_plain_run_by_method_and_rank():
    profile = load_profile("mini-hybrids")
    assert run_name(RunSpec.from_profile(profile, "boolq", "dora", variant="table6")) == "table6"
    assert run_name(RunSpec.from_profile(profile, "boolq", "dora")) == "DoRA, rank 2"
