"""A run's identity, its notebook parameters, and a store in which a record is whole or not there."""

import errno
import json
import os
from dataclasses import asdict, replace

import pytest

from dora_lab import files
from dora_lab.files import prepare_folder, write_lines
from dora_lab.pipeline import of_profile
from dora_lab.profiles import PROJECT, known_profiles, load_profile
from dora_lab.records import (
    RunRecord,
    RunResult,
    environment,
    is_done,
    read_failures,
    read_predictions,
    read_record,
    read_records,
    run_folder,
    write_failure,
    write_record,
)
from dora_lab.specs import RunSpec, spec_from_notebook


@pytest.fixture
def record(tiny_spec):
    result = RunResult(
        accuracy=0.75,
        n=24,
        correct=18,
        chance=0.5,
        unparsed_rate=0.0,
        trainable_parameters=10,
        total_parameters=100,
        train_loss=0.1,
        train_time_s=1.0,
        step_time_s=0.1,
        evaluation_time_s=0.5,
        peak_memory_bytes=1,
        resumed=False,
    )
    return RunRecord(tiny_spec(), result, environment(1))


@pytest.fixture
def folder(record, tmp_path):
    path = run_folder(tmp_path, record.spec)
    path.mkdir(parents=True)
    return path


# --- identity ---

OTHER_CHOICE = {"method": "lora", "split": "validation", "task": "winogrande", "evaluation": "generate"}
OTHER_CHOICE |= {"revision": "other", "tokenizer": "other", "quantisation": "nf4", "optimizer": "adamw-8bit"}
OTHER_CHOICE |= {"method_pattern": {"q_proj": "lora"}}
OTHER_CHOICE |= {"cut": "end", "variant": "other", "initialisation": "pissa", "evaluation_prompt": "alpaca"}


def test_every_field_but_names_and_places_moves_the_identity(tiny_spec):
    spec = tiny_spec()
    other = {str: "other", int: 7, float: 0.5, list: ["q_proj"], dict: {"q_proj": 7}, type(None): 7}
    for name, value in asdict(spec).items():
        changed = not value if isinstance(value, bool) else other[type(value)]
        changed = OTHER_CHOICE.get(name, changed)
        same = replace(spec, **{name: changed}).run_id == spec.run_id
        assert same == (name in ("profile", "base_model", "data", "tokenizer")), name


def test_every_recorded_run_has_the_identity_that_its_folder_has():
    """As its record says it, and as its profile gives it: a new setting at its default must move neither."""
    recorded = PROJECT / "data" / "results"
    for name in sorted(path.name for path in recorded.iterdir() if path.name in known_profiles()):
        profile, folder = load_profile(name), recorded / name
        records, damaged = read_records(folder)
        assert records and not damaged
        assert {r.spec.run_id for r in records} == {path.parent.name for path in folder.glob("*/record.json")}
        for spec in (record.spec for record in records):
            rate, steps = spec.learning_rate, spec.steps  # a rate may have been tuned since
            kind = (spec.task, spec.method, spec.rank, spec.seed)
            again = RunSpec.from_profile(profile, *kind, rate, steps, spec.split, spec.variant)
            assert (folder / again.run_id / "record.json").is_file(), f"{spec.run_id} is now {again.run_id}"
        assert of_profile(profile, records)


def test_the_identity_says_what_the_run_is(tiny_spec):
    assert tiny_spec().run_id.startswith("boolq-dora-r2-s0-")
    assert tiny_spec(method="full").run_id.startswith("boolq-full-s0-")
    assert len(tiny_spec().run_id.rsplit("-", 1)[1]) == 10
    assert tiny_spec().run_id == tiny_spec().run_id


def test_alpha_follows_the_rank_and_only_low_rank_methods_have_them(tiny_profile):
    profile = load_profile(tiny_profile)
    spec = RunSpec.from_profile(profile, "boolq", "lora", rank=8)
    assert (spec.rank, spec.alpha) == (8, profile.scaling * 8)
    for method in ("full", "dora-magnitude"):
        spec = RunSpec.from_profile(profile, "boolq", method)
        assert (spec.rank, spec.alpha) == (None, None)


def test_a_pattern_is_part_of_the_identity_and_so_is_its_order(tiny_spec):
    one, other = {"q_proj": "lora", ".*_proj": "frozen"}, {".*_proj": "frozen", "q_proj": "lora"}
    ids = {tiny_spec(**changes).run_id for changes in ({}, {"method_pattern": one}, {"method_pattern": other})}
    assert len(ids | {tiny_spec(initialisation="pissa").run_id}) == 4
    assert tiny_spec(method_pattern={}, initialisation="kaiming").run_id == tiny_spec().run_id


def test_what_cannot_be_attached_is_refused_before_anything_is_loaded(tiny_profile):
    profile = replace(load_profile(tiny_profile), method_pattern={"q_proj": "lora"})
    assert RunSpec.from_profile(profile, "boolq", "dora").adapter_config.of_module("a.q_proj").method == "lora"
    with pytest.raises(ValueError, match="method 'full' has none, leave the pattern out"):
        RunSpec.from_profile(profile, "boolq", "full")
    with pytest.raises(ValueError, match="initialisation 'pissa' is for lora and dora"):
        RunSpec.from_profile(replace(profile, method_pattern={}, initialisation="pissa"), "boolq", "dora-magnitude")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "bool-q"}, "unknown task 'bool-q': choose one of boolq"),
        ({"method": "dorra"}, "unknown method 'dorra': choose one of full, lora, dora"),
        ({"task": "piqa"}, "profile 'tiny' has no learning rate for dora on piqa"),
        ({"task": "piqa", "learning_rate": 0.1}, "profile 'tiny' has no steps for piqa: it has boolq"),
        ({"method": "full", "rank": 4}, "method 'full' has no rank"),
        ({"rank": 0}, "rank: .*greater than or equal to 1, got 0"),
        ({"seed": -1}, "seed: .*got -1"),
        ({"steps": 0}, "steps: .*got 0"),
        ({"learning_rate": 2.0}, "learning_rate: .*got 2.0"),
        ({"split": "dev"}, "split: .*got 'dev'"),
    ],
)
def test_a_run_that_cannot_be_is_refused(tiny_profile, arguments, message):
    with pytest.raises(ValueError, match=message):
        RunSpec.from_profile(load_profile(tiny_profile), **{"task": "boolq", "method": "dora"} | arguments)


def test_a_checkpoint_is_not_chosen_on_what_it_is_scored_on(tiny_profile):
    profile = replace(load_profile(tiny_profile), best_of_checkpoints=5)
    assert RunSpec.from_profile(profile, "boolq", "dora").best_of_checkpoints == 5
    with pytest.raises(ValueError, match="chooses on validation examples.*take split test"):
        RunSpec.from_profile(profile, "boolq", "dora", split="validation")


# --- notebook parameters ---


def _namespace(tiny_profile, **changes):
    ipython = {"In": [], "Out": {}, "get_ipython": None, "exit": None, "quit": None, "open": open, "_ih": [], "_": ""}
    return ipython | {"profile": str(tiny_profile), "task": "boolq", "method": "dora"} | changes


def test_a_notebooks_parameters_make_the_same_run(tiny_profile, tiny_spec, tmp_path):
    empty = {"rank": "", "seed": 0, "learning_rate": None, "steps": "", "split": "test"}
    spec, runs_dir = spec_from_notebook(_namespace(tiny_profile, runs_dir=str(tmp_path), **empty))
    assert spec == tiny_spec() and runs_dir == tmp_path
    spec, _ = spec_from_notebook(_namespace(tiny_profile, rank=4, seed=3, learning_rate=1e-3, steps=5))
    assert (spec.rank, spec.seed, spec.learning_rate, spec.steps) == (4, 3, 1e-3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 0}, "unknown parameter 'sede': did you mean 'seed'"),
        ({"zzz": 0}, "unknown parameter 'zzz': known are profile, task, method"),
        ({"seed": "abc"}, "'seed' must be an integer, got 'abc'"),
        ({"seed": 1.5}, "'seed' must be an integer, got 1.5"),
        ({"steps": True}, "'steps' must be an integer, got True"),
        ({"learning_rate": "fast"}, "'learning_rate' must be a number, got 'fast'"),
        ({"task": 3}, "'task' must be a text, got 3"),
        ({"method": ""}, "'method' is missing"),
    ],
)
def test_unknown_and_mistyped_parameters_are_errors(tiny_profile, changes, message):
    with pytest.raises(ValueError, match=message):
        spec_from_notebook(_namespace(tiny_profile, **changes))


# --- the store ---


def test_a_record_reads_back_as_it_was_written(record, folder):
    assert not is_done(folder)
    write_record(folder, record)
    assert is_done(folder) and read_record(folder) == record
    assert read_record(folder).spec.run_id == folder.name
    assert read_records(folder.parent) == ([record], [])


def test_predictions_read_back(folder):
    rows = [{"id": "a", "gold": "true", "prediction": "false", "log_likelihoods": {"true": -1.5}, "parsed": True}]
    write_lines(folder / "predictions.jsonl", rows)
    assert read_predictions(folder) == rows
    (folder / "predictions.jsonl").write_text('{"id": "a"}\n{"id": ')
    with pytest.raises(ValueError, match=r"predictions.jsonl, line 2 is damaged: delete .*boolq-dora"):
        read_predictions(folder)


def test_records_come_sorted(record, tmp_path):
    changes = ({"seed": 1}, {"seed": 0}, {"method": "lora"}, {"task": "winogrande"})
    specs = [replace(record.spec, **c) for c in changes]
    for spec in specs:
        path = run_folder(tmp_path, spec)
        path.mkdir(parents=True)
        write_record(path, replace(record, spec=spec))
    found, damaged = read_records(tmp_path / "tiny")
    assert [(r.spec.task, r.spec.method, r.spec.seed) for r in found] == [
        ("boolq", "dora", 0),
        ("boolq", "dora", 1),
        ("boolq", "lora", 0),
        ("winogrande", "dora", 0),
    ]
    assert damaged == [] and read_records(tmp_path / "nothing") == ([], [])


@pytest.mark.parametrize("damage", ["half", "empty", "field", "binary"])
def test_a_damaged_record_is_named_with_the_folder_to_delete(record, folder, tmp_path, damage):
    write_record(folder, record)
    path = folder / "record.json"
    text = path.read_text()
    values = json.loads(text)
    del values["result"]["accuracy"]
    content = {"half": text[: len(text) // 2], "empty": "", "field": json.dumps(values), "binary": "\udcff\udcfe"}
    path.write_bytes(content[damage].encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"record.json is damaged .*: delete the folder {folder} and run again"):
        read_record(folder)
    whole = run_folder(tmp_path, replace(record.spec, seed=9))
    whole.mkdir(parents=True)
    write_record(whole, replace(record, spec=replace(record.spec, seed=9)))
    found, damaged = read_records(folder.parent)
    assert [r.spec.seed for r in found] == [9] and len(damaged) == 1 and str(folder) in damaged[0]


def test_a_failure_is_kept_until_the_run_succeeds(record, folder):
    write_failure(folder, record.spec, "ValueError: no")
    (failure,) = read_failures(folder.parent)
    assert (failure["task"], failure["method"], failure["error"]) == ("boolq", "dora", "ValueError: no")
    assert failure["folder"] == str(folder)
    write_record(folder, record)
    assert read_failures(folder.parent) == []


def test_a_full_disk_is_named_and_loses_nothing(record, folder, monkeypatch):
    write_record(folder, record)
    before = (folder / "record.json").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*record.json \(No space left on device\): free space") as caught:
        write_record(folder, record)
    assert caught.value.errno == errno.ENOSPC
    assert (folder / "record.json").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["record.json"]


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(OSError, match=r"cannot write to .*runs/tiny.*give another folder as runs_dir"):
        prepare_folder(tmp_path / "runs" / "tiny")


def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    user = os.geteuid()
    if user == 0:  # root may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(OSError, match="cannot write to .*runs"):
            prepare_folder(tmp_path / "runs" / "tiny")
    finally:
        os.seteuid(user)


def test_the_environment_says_on_what_a_run_ran(record):
    versions = record.environment["versions"]
    assert {"torch", "transformers", "peft"} <= set(versions) and record.environment["threads"] == 1
    assert record.environment["date"].endswith("+00:00")
