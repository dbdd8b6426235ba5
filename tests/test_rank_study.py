"""The study of ranks: its profile made again, its runs' identities, its comparisons and figures."""

from dataclasses import replace

import pytest
import yaml

from dora_lab.pipeline import RECORDED, grid
from dora_lab.profiles import FOLDER, PROJECT, load_profile
from dora_lab.rank_figures import (
    accuracy_by_budget,
    accuracy_by_budget_alt,
    as_map,
    rank_maps,
    rank_maps_alt,
    truncation_curves,
    truncation_curves_alt,
)
from dora_lab.rank_results import Cell, accuracy_table, difference_table, read_cells, verdict, write_ranks
from dora_lab.rank_study import allocate_all, criterion_of, profile_text, training_batches, variant_name
from dora_lab.ranks import CONTROLS, CRITERIA, adapter_parameters, reversed_ranks, shuffled_ranks, uniform_budget
from dora_lab.shapes import SHAPES
from dora_lab.specs import RunSpec

STUDY = "mini-ranks"
LINEARS = SHAPES["mini-world"].linears


@pytest.fixture(scope="module")
def study():
    return load_profile(STUDY)


def patterns(profile) -> dict[str, dict[str, int]]:
    return {name: values["rank_pattern"] for name, values in profile.variants.items() if "rank_pattern" in values}


def test_every_variant_meets_its_budget_from_below_by_less_than_a_rank(study):
    for name, pattern in patterns(study).items():
        shapes = {module: LINEARS[module.rpartition(".")[2]] for module in pattern}
        left = uniform_budget(shapes, study.variants[name]["rank"]) - adapter_parameters(shapes, pattern)
        assert len(pattern) == 30 and 0 <= left < 592, name


def test_the_controls_of_the_shipped_profile_are_dealt_from_its_update_spectrum(study):
    for rank in (2, 4):
        own = study.variants[f"update-spectrum-{rank}"]["rank_pattern"]
        shapes = {module: LINEARS[module.rpartition(".")[2]] for module in own}
        assert study.variants[f"shuffled-{rank}"]["rank_pattern"] == shuffled_ranks(shapes, own)
        assert study.variants[f"reversed-{rank}"]["rank_pattern"] == reversed_ranks(shapes, own)


def test_ranks_from_the_shipped_weights_are_those_of_the_shipped_profile(study):
    found = allocate_all(study, [2, 4], criteria=("stable_rank", "effective_rank"), report=lambda _: None)
    for (criterion, rank), own in found.items():
        known = study.variants.get(variant_name(criterion, rank), {}).get("rank_pattern")
        assert own.rank_pattern == (known or dict.fromkeys(own.rank_pattern, rank)), (criterion, rank)


@pytest.mark.slow
def test_ranks_from_training_data_are_those_of_the_shipped_profile(study):
    """Sums round otherwise on other machines, which may move a rank between two modules that are nearly even."""
    found = allocate_all(study, [2, 4], report=lambda _: None)
    for (criterion, rank), own in found.items():
        if criterion in ("update_spectrum", "explained_variance", "gradient_spectrum"):
            known = study.variants[variant_name(criterion, rank)]["rank_pattern"]
            moved = sum(abs(known[name] - own.rank_pattern[name]) for name in known)
            assert moved <= 0.05 * sum(known.values()), (criterion, rank)


def test_uniform_ranks_of_the_study_are_the_runs_of_the_profile_it_extends(study):
    mini = load_profile("mini")
    for rank, variant in ((2, None), (4, "uniform-4")):
        own = RunSpec.from_profile(study, "boolq", "dora", variant=variant)
        other = RunSpec.from_profile(mini, "boolq", "dora", rank=rank)
        assert own.run_id.rpartition("-")[2] == other.run_id.rpartition("-")[2]
        assert criterion_of(own) == ("uniform", rank)


def test_a_pattern_is_part_of_a_runs_identity_and_brings_its_alphas(study):
    specs = grid(study)
    assert len({spec.run_id.rpartition("-")[2] for spec in specs}) == len(specs)
    spec = RunSpec.from_profile(study, "hellaswag", "dora", variant="gradient-spectrum-4")
    assert spec.alpha_pattern == {name: 2.0 * rank for name, rank in spec.rank_pattern.items()}
    assert criterion_of(spec) == ("gradient_spectrum", 4)
    assert replace(spec, rank_pattern={}, alpha_pattern={}).run_id != spec.run_id
    assert replace(spec, alpha_pattern={}).run_id != spec.run_id
    full = RunSpec.from_profile(replace(study, rank_pattern={"q_proj": 3}), "boolq", "full")
    assert full.rank_pattern == {} and full.run_id == RunSpec.from_profile(load_profile("mini"), "boolq", "full").run_id


def test_an_alpha_of_its_own_goes_before_the_scaling(tiny_profile):
    profile = replace(
        load_profile(tiny_profile), rank_pattern={"q_proj": 3, "v_proj": 5}, alpha_pattern={"q_proj": 1.5}
    )
    assert RunSpec.from_profile(profile, "boolq", "lora").alpha_pattern == {"q_proj": 1.5, "v_proj": 10.0}


@pytest.mark.parametrize(("values", "message"), [({"q_proj": 0}, "greater than or equal to 1"), ([3], "dictionary")])
def test_a_wrong_pattern_in_a_profile_is_named(tmp_path, tiny_profile, values, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"extends": str(tiny_profile), "name": "wrong", "rank_pattern": values}))
    with pytest.raises(ValueError, match=f"wrong.yaml: rank_pattern.*{message}"):
        load_profile(path)


def test_the_profile_that_is_written_is_the_allocations_that_were_made(tiny_profile, tmp_path):
    tiny = replace(load_profile(tiny_profile), batch_size=1, train_examples=30)
    found = allocate_all(tiny, [1, 3], criteria=("uniform", "stable_rank", "effective_rank"), report=lambda _: None)
    path = tmp_path / "own.yaml"
    path.write_text(profile_text("own", str(tiny_profile), tiny, "dora", found))
    own = load_profile(path)
    assert own.variants["uniform-3"] == {"rank": 3} and "uniform-2" not in own.variants
    assert own.variants["stable-rank-3"] == {"rank": 3, "rank_pattern": found["stable_rank", 3].rank_pattern}
    assert "stable-rank-1" not in own.variants  # at rank 1 there is nothing to allot
    spec = RunSpec.from_profile(own, "boolq", "dora", variant="stable-rank-3")
    assert spec.alpha_pattern == found["stable_rank", 3].alpha_pattern


@pytest.mark.parametrize("name", ["2024", "2024-05-01", "null", "a: b", "[c", "d #e", "ü" * 90])
def test_a_name_is_read_back_as_the_name_that_was_written(tiny_profile, tmp_path, name):
    base = tmp_path / f"{name}.yaml"  # a path of such words as well
    base.write_text(tiny_profile.read_text())
    for extends in (str(base), base.name):
        (tmp_path / "own.yaml").write_text(profile_text(name, extends, load_profile(base), "dora", {}) + "  {}\n")
        assert load_profile(tmp_path / "own.yaml").name == name


def test_the_committed_profile_begins_as_it_is_written(study):
    committed = (FOLDER / f"{STUDY}.yaml").read_text()
    assert committed.startswith(
        profile_text(STUDY, "mini", replace(load_profile("mini"), tasks=study.tasks), "dora", {})
    )


def test_batches_are_of_all_tasks_and_no_validation_or_test_question(tiny_profile, tiny_base):
    from dora_lab.data import load_examples
    from dora_lab.models import load_tokenizer
    from dora_lab.tasks import prompt

    tiny, tokenizer = load_profile(tiny_profile), load_tokenizer(str(tiny_base))
    batches = training_batches(tiny, tokenizer, 20)
    read = {tuple(row[row != 0].tolist()) for batch in batches for row in batch["input_ids"]}
    for task in tiny.tasks:
        for split in ("train", "validation", "test"):
            examples = load_examples(tiny.data, task, split, validation_examples=tiny.validation_examples)
            starts = [tuple(tokenizer(prompt(example, tiny.prompt))["input_ids"]) for example in examples]
            if split == "train" or task == "boolq":  # the other tasks' tiny files repeat themselves
                assert any(row[: len(start)] == start for row in read for start in starts) == (split == "train"), split
    with pytest.raises(ValueError, match="100 batches of 4 need 400 training examples, there are 100"):
        training_batches(tiny, tokenizer, 100)


def test_controls_need_what_they_control(study):
    with pytest.raises(ValueError, match="deal the ranks of update_spectrum anew"):
        allocate_all(study, [2], criteria=("uniform", *CONTROLS))


# --- comparisons ---


def cell(right: float, seeds=(0, 1, 2), items: int = 400) -> Cell:
    answers = {seed: {f"q{i}": (i + seed) % items < right * items for i in range(items)} for seed in seeds}
    return Cell(1000, {seed: right for seed in seeds}, answers)


RIGHT = {"uniform": 0.6, "stable_rank": 0.6, "update_spectrum": 0.8, "shuffled": 0.8, "reversed": 0.9}
CELLS = {("boolq", "uniform", 1): cell(0.5)} | {
    ("boolq", criterion, 2): cell(right)
    for criterion, right in {
        "uniform": 0.6,
        "stable_rank": 0.6,
        "update_spectrum": 0.8,
        "shuffled": 0.8,
        "reversed": 0.9,
    }.items()
}


def test_criteria_are_compared_with_uniform_and_both_controls_at_their_budget():
    table = difference_table(CELLS).set_index("criterion")
    estimates = {name: row["uniform"].estimate for name, row in table.iterrows()}
    assert estimates == pytest.approx({"stable_rank": 0, "update_spectrum": 0.2, "shuffled": 0.2, "reversed": 0.3})
    assert table.loc["update_spectrum", "reversed"].estimate == pytest.approx(-0.1)
    assert table.loc["shuffled", "shuffled"] is None and table.loc["stable_rank", "shuffled"] is None
    assert table.loc["update_spectrum", "p uniform"] < 0.05 and table.loc["stable_rank", "p uniform"] > 0.99
    assert table.loc["update_spectrum", "p reversed"] < 0.05 < table.loc["update_spectrum", "p shuffled"]
    assert set(table["rank"]) == {2}


def test_the_verdict_says_no_better_than_shuffled_where_that_is_what_it_is():
    said = "\n".join(verdict(difference_table(CELLS)))
    assert "stable rank minus uniform ranks: +0.0 (" in said
    assert "3 seeds, at the budget of rank 2: no difference" in said
    assert "update spectrum minus uniform ranks: +20.0 (" in said and "rank 2: ahead" in said
    shuffled, reverse = (next(line for line in said.splitlines() if f"own ranks {name}" in line) for name in CONTROLS)
    assert "+0.0 (" in shuffled and shuffled.endswith("no difference shown.")
    assert "-10.0 (" in reverse and reverse.endswith("behind.")
    assert said.splitlines()[-1].startswith("The ranks of stable rank were not dealt anew")


def test_one_seed_gives_no_verdict():
    lone = {key: cell(one.accuracy[0], seeds=(0,)) for key, one in CELLS.items()}
    said = verdict(difference_table(lone))
    assert all("1 seed, at the budget of rank 2: one seed: no verdict" in line for line in said[:-1]) and len(said) == 5
    assert "80.0 (one seed)" in accuracy_by_budget_alt(lone)


def test_what_was_not_run_is_left_out():
    assert difference_table({}).empty and verdict(difference_table({})) == [] and accuracy_table({}).empty
    other = {("boolq", "stable_rank", 2): cell(0.7, seeds=(7,)), ("boolq", "uniform", 2): cell(0.6)}
    assert difference_table(other)["uniform"].tolist() == [None]
    assert verdict(difference_table(other))[0] == "stable rank minus uniform ranks: not run."


def test_cells_are_read_from_the_runs_of_the_study_and_of_the_profile_it_extends(study):
    cells = read_cells([(study, RECORDED), (load_profile("mini"), RECORDED)])
    uniform = {(task, rank) for task, criterion, rank in cells if criterion == "uniform"}
    assert {(task, rank) for task in study.tasks for rank in (1, 2, 4, 8)} <= uniform
    for (_, criterion, _), own in cells.items():
        assert criterion in CRITERIA and own.accuracy.keys() == own.answers.keys()
        for seed, answers in own.answers.items():
            assert sum(answers.values()) / len(answers) == pytest.approx(own.accuracy[seed])


def test_uniform_runs_of_other_seeds_than_the_studys_are_left_out(study):
    """So that no mean of the table is of other seeds than what it is compared with."""
    alone, beside = (
        read_cells([(load_profile("mini"), RECORDED)]),
        read_cells([(study, RECORDED), (load_profile("mini"), RECORDED)]),
    )
    assert len(alone["boolq", "uniform", 2].accuracy) > 3
    for task in study.tasks:
        seeds = {tuple(own.accuracy) for (of, _, _), own in beside.items() if of == task}
        assert seeds == {(0, 1, 2)}


def test_recorded_runs_trained_what_their_budget_allows(study):
    cells = read_cells([(study, RECORDED)])
    uniform = read_cells([(load_profile("mini"), RECORDED)])
    for (task, criterion, rank), own in cells.items():
        left = uniform[task, "uniform", rank].parameters - own.parameters
        assert 0 <= left < 592, (task, criterion, rank)


# --- pages and figures ---


def test_the_page_has_both_tables_and_the_verdict(tmp_path):
    text = write_ranks(CELLS, difference_table(CELLS), tmp_path / "new").read_text()
    assert "| BoolQ | update spectrum | 2 | 1000 | 3 | 80.0 ± 0.0 |" in text
    assert "- update spectrum minus its own ranks shuffled: +0.0 (" in text
    assert "Mean over BoolQ of the difference" in text


@pytest.mark.slow
def test_the_committed_page_is_what_the_recorded_runs_say(tmp_path, study):
    cells = read_cells([(study, RECORDED), (load_profile("mini"), RECORDED)])
    cells = {key: own for key, own in cells.items() if key[0] in study.tasks}
    page = write_ranks(cells, difference_table(cells), tmp_path)
    assert page.read_text() == (PROJECT / "figures" / "ranks.md").read_text(), "out of date: run chapter 13"


def test_a_map_has_layers_down_and_modules_across():
    values = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.self_attn.q_proj": 5, "h.1.mlp.up_proj": 2}
    columns, grid = as_map(values)
    assert columns == ["q_proj", "up_proj"] and grid[:, 0].tolist() == [3, 5] and grid[1, 1] == 2
    assert "to 5, mean over layers q 4.0, up 2.0" in rank_maps_alt({"one": values}, "Ranks")
    texts = {text.get_text() for text in rank_maps({"one": values, "two": values}, "Ranks").axes[0].texts}
    assert texts == {"3", "5", "2"}
    tenfold = {"one": values, "two": {name: 10 * value for name, value in values.items()}}
    for one_scale, same in ((True, True), (False, False)):
        one, two = (axes.images[0].get_clim() for axes in rank_maps(tenfold, "Ranks", one_scale=one_scale).axes)
        assert (one == two) == same
    deep = {f"h.{layer}.q_proj": layer for layer in range(32)}
    assert rank_maps({"deep": deep}, "Ranks").get_figheight() > 9  # a line of text for every layer
    with pytest.raises(ValueError, match="'lm_head' is in no numbered layer"):
        as_map({"lm_head": 3})


def test_the_figure_has_a_panel_a_task_and_a_mark_a_criterion():
    figure = accuracy_by_budget(CELLS | {("hellaswag", "uniform", 2): cell(0.5)})
    assert [axes.get_title() for axes in figure.axes] == ["BoolQ", "HellaSwag"]
    assert len(figure.axes[0].containers) == 5
    alt = accuracy_by_budget_alt(CELLS)
    assert "BoolQ at the budget of rank 2: uniform 60.0 ± 0.0" in alt and "reversed (update spectrum) 90.0" in alt


def test_truncation_curves_have_every_point():
    curves = {"dora": [(0, 25.0), (2, 80.0)], "full": [(0, 25.0), (2, 30.0)]}
    assert len(truncation_curves(curves).axes[0].lines) == 2
    assert "DoRA: 25.0 at 0, 80.0 at 2; full fine-tuning: 25.0 at 0, 30.0 at 2" in truncation_curves_alt(curves)
