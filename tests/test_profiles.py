"""Profiles: the shipped ones are sound, and every mistake in one is named."""

import re
from dataclasses import replace

import pytest
import yaml

from dora_lab.adapters import METHODS
from dora_lab.profiles import FOLDER, Method, extended_profiles, known_profiles, load_profile


def test_the_shipped_profiles_load_and_cover_their_own_grid():
    assert {"mini", "smoke"} <= set(known_profiles())
    for name in known_profiles():
        profile = load_profile(name)
        assert profile.name == name
        for method in profile.methods:
            assert set(profile.tasks) <= set(profile.learning_rate[method])
        assert not set(profile.seeds) & set(profile.sweep_seeds)  # rates are not chosen on the seeds that are reported


def test_methods_are_those_of_the_adapters():
    assert set(Method.__args__) == set(METHODS)


def test_an_unknown_profile_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown profile 'mimi': choose one of .*mini.*smoke"):
        load_profile("mimi")


def _write(tmp_path, tiny_profile, **changes):
    values = yaml.safe_load(tiny_profile.read_text()) | changes
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value != "DROP"}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1e-3}, "learning_rat: Unexpected keyword argument"),
        ({"rank": "DROP"}, "rank: .*required"),
        ({"rank": 0}, "rank: .*greater than or equal to 1, got 0"),
        ({"rank": True}, "rank: .*valid integer, got True"),
        ({"batch_size": "many"}, "batch_size: .*got 'many'"),
        ({"methods": ["lora", "dorra"]}, "methods.1: .*got 'dorra'"),
        ({"dropout": 1.0}, "dropout: .*less than 1"),
        ({"prompt": "chat"}, "prompt: .*'alpaca'.*got 'chat'"),
        ({"learning_rate": {"lora": {"boolq": -1.0}}}, "learning_rate.lora.boolq: .*got -1.0"),
        ({"tasks": ["boolq", "bool-q"]}, "unknown task 'bool-q'"),
        ({"tasks": []}, r"tasks: .*at least 1 item.*got \[\]"),
        ({"methods": []}, "methods: .*at least 1 item"),
        ({"seeds": []}, "seeds: .*at least 1 item"),
        ({"sweep_seeds": []}, "sweep_seeds: .*at least 1 item"),
        ({"learning_rate_grid": []}, "learning_rate_grid: .*at least 1 item"),
        ({"steps": {"boolq": 3}}, "steps has no entry for the task.* hellaswag, winogrande"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_file(tmp_path, tiny_profile, changes, message):
    path = _write(tmp_path, tiny_profile, **changes)
    with pytest.raises(ValueError, match=f"changed.yaml: .*{message}"):
        load_profile(path)


@pytest.mark.parametrize("text", ["a: [1", "!!python/object/apply:os.getcwd []", "\x00"])
def test_what_is_not_safe_yaml_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="bad.yaml is not YAML"):
        load_profile(path)


@pytest.mark.parametrize("text", ["", "- a list", "just words"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="bad.yaml: "):
        load_profile(path)


def test_relative_folders_start_at_the_profiles_own_file(tmp_path, tiny_profile, monkeypatch):
    path = _write(tmp_path, tiny_profile, base_model="./base", data="tasks")
    monkeypatch.chdir("/")
    profile = load_profile(path)
    assert (profile.base_model, profile.data) == (str(tmp_path / "base"), str(tmp_path / "tasks"))


def test_relative_folders_of_a_variant_start_at_the_profiles_own_file_too(tmp_path, tiny_profile, monkeypatch):
    places = {"base_model": "./base", "tokenizer": "./words", "data": "tasks"}
    other = {"base_model": "yahma/llama-7b-hf", "data": "mini-world", "rank": 1}
    path = _write(tmp_path, tiny_profile, variants={"moved": places, "other": other, "none": {"tokenizer": None}})
    above = tmp_path / "above" / "own.yaml"
    above.parent.mkdir()
    above.write_text("extends: ../changed.yaml\nname: own\nvariants: {own: {data: ./tasks}}\n")
    monkeypatch.chdir("/")
    profile = load_profile(path)
    moved = {key: str(tmp_path / name) for key, name in (("base_model", "base"), ("tokenizer", "words"))}
    assert profile.variants == {"moved": moved | {"data": str(tmp_path / "tasks")}, "other": other} | {
        "none": {"tokenizer": None}
    }
    assert profile.variant("moved").data == str(tmp_path / "tasks")
    assert load_profile(above).variants == {"own": {"data": str(tmp_path / "above" / "tasks")}}


def test_a_hub_id_stays_a_hub_id(tmp_path, tiny_profile):
    assert load_profile(_write(tmp_path, tiny_profile, base_model="yahma/llama-7b-hf")).base_model.startswith("yahma/")


@pytest.mark.parametrize("name", ["small", "llama-7b", "llama-7b-as-reported", "llama-7b-paper"])
def test_every_value_of_a_real_profile_says_where_it_is_from(name):
    """A comment on the line, on the line of the key above it, or on the lines in front of it."""
    path, commented = FOLDER / f"{name}.yaml", False
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            commented = True
        elif line.startswith(" "):
            assert "#" in line or commented, f"{path.name}: {line}"
        else:
            own = "#" in line
            assert own or commented or line.split(":")[0] in ("name", "summary", "learning_rate"), (
                f"{path.name}: {line}"
            )
            commented = commented and not own


def test_the_llama_profiles_are_the_reports_six_runs_and_the_papers_recipe():
    mended, reported, paper = map(load_profile, ("llama-7b", "llama-7b-as-reported", "llama-7b-paper"))
    for profile in (mended, reported):
        cells = {(t, m) for t in profile.tasks for m in profile.methods}
        assert len(cells) == 6 and len(profile.seeds) == 1
    assert (mended.rank, mended.scaling, mended.batch_size, mended.warmup_steps) == (32, 2.0, 16, 100)
    assert not mended.train_on_prompt and mended.gradient_checkpointing and mended.cutoff_tokens == "auto"
    assert reported.train_on_prompt and not reported.gradient_checkpointing and reported.cut == "end"
    assert (reported.cutoff_tokens, reported.dtype, reported.evaluation) == (256, "float16", "generate")
    assert (reported.best_of_checkpoints, mended.best_of_checkpoints) == (120, None)
    assert paper.tasks == ["commonsense_170k"] and paper.evaluation == "generate"


# --- variants ---


def test_a_profile_extends_another_and_changes_what_it_names(tmp_path):
    (tmp_path / "own.yaml").write_text("extends: mini\nname: own\nsummary: one seed\nseeds: [7]\n")
    own, mini = load_profile(tmp_path / "own.yaml"), load_profile("mini")
    assert own == replace(mini, name="own", summary="one seed", seeds=[7])


def test_a_profile_may_extend_a_file_beside_it(tmp_path, tiny_profile):
    path = tiny_profile.parent / "own.yaml"
    path.write_text(f"extends: {tiny_profile.name}\nname: own\nrank: 3\n")
    assert load_profile(path) == replace(load_profile(tiny_profile), name="own", rank=3)


def test_the_profiles_that_one_extends_come_nearest_first(tmp_path):
    (tmp_path / "one.yaml").write_text("extends: mini\nname: one\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\nname: two\n")
    assert extended_profiles("mini") == []
    assert extended_profiles(tmp_path / "two.yaml") == [load_profile(tmp_path / "one.yaml"), load_profile("mini")]


def test_profiles_that_extend_each_other_are_named(tmp_path):
    for name, base in (("self", "self"), ("a", "b"), ("b", "a"), ("into", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}.yaml\nname: {name}\n")
    for name, circle in (("self", "self self"), ("a", "a b a"), ("into", "a b a")):
        files = " -> ".join(str(tmp_path / f"{part}.yaml") for part in circle.split())
        with pytest.raises(ValueError, match=f"extend each other in a circle: {re.escape(files)}; take one"):
            load_profile(tmp_path / f"{name}.yaml")


def test_a_variant_is_the_profile_with_its_own_values(tmp_path, tiny_profile):
    profile = load_profile(_write(tmp_path, tiny_profile, variants={"short": {"cutoff_tokens": 9}, "same": {}}))
    assert profile.variant("short") == replace(profile, cutoff_tokens=9, variants={})
    assert profile.variant("same") == replace(profile, variants={})
    assert profile.variant(None) is profile
    with pytest.raises(ValueError, match="profile 'tiny' has no variant 'shrt': its variants are same, short"):
        profile.variant("shrt")


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"Short!": {}}, "variant 'Short!': a name is made of small letters"),
        ({"short": {"cutoff": 9}}, "variant 'short': cutoff: Unexpected keyword argument"),
        ({"short": {"cutoff_tokens": 0}}, "variant 'short': .*got 0"),
        ({"short": {"seeds": [3], "tasks": ["boolq"]}}, "variant 'short' cannot change seeds, tasks"),
        ({"short": {"cut": "end"}}, "variant 'short': .*cut 'end' .*needs train_on_prompt true"),
        ({"short": {"answers_cut": 0.5}}, "variant 'short': .*answers_cut .*needs train_on_prompt true"),
        ({"short": {"answers_cut": 1.0}}, "variant 'short': answers_cut: .*less than 1, got 1.0"),
        ({"short": {"best_of_checkpoints": 11}}, "best_of_checkpoints 11: .*fewer validation_examples"),
        ({"short": {"evaluation_prompt": "alpacca"}}, "variant 'short': evaluation_prompt: .*got 'alpacca'"),
    ],
)
def test_a_variant_that_cannot_be_is_named(tmp_path, tiny_profile, variants, message):
    with pytest.raises(ValueError, match=message):
        load_profile(_write(tmp_path, tiny_profile, variants=variants))
