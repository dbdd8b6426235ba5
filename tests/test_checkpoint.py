"""Adapters through files: our own round trip, PEFT's in both directions, and every way a file can be wrong."""

import copy
import errno
import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_llama import base_model
from torch import nn
from transformers import LlamaForCausalLM

from dora_lab.adapters import LLAMA_TARGETS, AdapterConfig, adapted_modules, attach, merge, unmerge
from dora_lab.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter

TOKENS = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))  # (batch, positions)
CONFIGS = {
    "lora": AdapterConfig("lora", 4, 6, dropout=0.1),
    "dora": AdapterConfig("dora", 4, 6, dropout=0.1),
    "dora-magnitude": AdapterConfig("dora-magnitude", dropout=0.1),
}
every_adapter = pytest.mark.parametrize("method", list(CONFIGS))
TABLE_6 = {"up_proj": "dora-magnitude", "down_proj": "dora-magnitude"}  # the paper's, in part
WEIGHT_KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def randomise(parameters) -> None:
    """As after training, when neither B = 0 nor m = ‖W0‖ holds."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def trained(method: str) -> LlamaForCausalLM:
    model = attach(base_model(), CONFIGS[method])
    randomise(p for p in model.parameters() if p.requires_grad)
    return model


@pytest.fixture
def saved(tmp_path):
    """A saved DoRA adapter."""
    save_adapter(trained("dora"), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


# --- Round trips ---


@every_adapter
def test_what_was_saved_is_loaded_into_a_base_model(method, tmp_path):
    model = trained(method)
    save_adapter(model, tmp_path / "runs" / "adapter")
    loaded = load_adapter(base_model(), tmp_path / "runs" / "adapter")
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.adapter_config.method == method
    assert set(loaded.adapter_config.target_modules) == set(model.adapter_config.target_modules)
    for setting in ("rank", "alpha", "dropout"):
        assert getattr(loaded.adapter_config, setting) == getattr(model.adapter_config, setting)
    assert sorted(os.listdir(tmp_path / "runs" / "adapter")) == [CONFIG_FILE, WEIGHTS_FILE]


@every_adapter
def test_what_was_saved_is_loaded_into_attached_adapters(method, tmp_path):
    model = trained(method)
    save_adapter(model, tmp_path)
    other = attach(base_model(), CONFIGS[method])
    parameters = [p for p in other.parameters() if p.requires_grad]
    assert load_adapter(other, str(tmp_path)) is other
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    still = [p for p in other.parameters() if p.requires_grad]  # an optimizer holds these
    assert all(a is b for a, b in zip(parameters, still, strict=True))


@every_adapter
def test_peft_reads_ours_with_the_same_output(method, tmp_path):
    model = trained(method)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert theirs.peft_config["default"].use_dora == (method != "lora")
    assert theirs.peft_config["default"].task_type == "CAUSAL_LM"


PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 6},
    "alpha_pattern": {"v_proj": 3},
    "use_rslora": True,
}


def test_patterns_and_rslora_go_both_ways(tmp_path):
    theirs = get_peft_model(
        base_model(), LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=list(LLAMA_TARGETS), **PATTERNS)
    ).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(base_model(), tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    modules = adapted_modules(model)
    assert [modules[f"model.layers.{i}.self_attn.q_proj"].lora_A.shape[0] for i in (0, 1)] == [2, 4]
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(base_model(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_magnitude_only_modules_go_to_peft_and_come_back(tmp_path):
    model = attach(base_model(), AdapterConfig("dora", 4, 6, method_pattern=TABLE_6))
    randomise(p for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    back = load_adapter(base_model(), tmp_path)
    assert torch.equal(back(TOKENS).logits, model(TOKENS).logits)
    assert back.adapter_config.method_pattern == TABLE_6 and not back.adapter_config.rank_pattern


@pytest.mark.parametrize("only_m", [(), ("up_proj", "down_proj")], ids=["dora", "table-6"])
def test_a_checkpoint_of_the_authors_code_is_read(only_m, tmp_path):
    model = attach(base_model(), AdapterConfig("dora", 4, 6, method_pattern=dict.fromkeys(only_m, "dora-magnitude")))
    randomise(p for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path)
    theirs = {}
    for key, value in load_file(tmp_path / WEIGHTS_FILE).items():
        if key.endswith("lora_magnitude_vector"):
            theirs[key.replace("lora_magnitude_vector", "weight_m_wdecomp.weight")] = value[:, None]
        elif not any(f".{name}." in key for name in only_m):
            theirs[key] = value
    save_file(theirs, tmp_path / WEIGHTS_FILE)
    config = {"peft_type": "DORA", "r": 4, "lora_alpha": 6, "lora_dropout": 0.05, "bias": "none", "dora_simple": True}
    config |= {"target_modules": [name for name in LLAMA_TARGETS if name not in only_m], "merge_weights": False}
    config |= {"Wdecompose_target_modules": list(only_m) or None, "fan_in_fan_out": False, "enable_lora": None}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    torch.testing.assert_close(load_adapter(base_model(), tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ours_reads_pefts_with_the_same_output(method, init, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, use_dora=method == "dora", target_modules=list(LLAMA_TARGETS),
        task_type="CAUSAL_LM", init_lora_weights=init,
    )  # fmt: skip
    theirs = get_peft_model(base_model(), config).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(base_model(), tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert (model.adapter_config.method, model.adapter_config.rank, model.adapter_config.dropout) == (method, 4, 0.1)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_files_hold_the_same_keys_and_shapes_as_pefts(method, tmp_path):
    save_adapter(trained(method), tmp_path / "ours")
    PeftModel.from_pretrained(base_model(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / WEIGHTS_FILE) for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    settings = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    their_settings = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    their_settings["target_modules"].sort()
    compared = settings.keys() - {"base_model_name_or_path"}
    assert {key: settings[key] for key in compared} == {key: their_settings[key] for key in compared}


def test_magnitude_only_says_what_it_is(tmp_path):
    save_adapter(trained("dora-magnitude"), tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert file.metadata()["dora_lab.method"] == "dora-magnitude"
        assert not file.get_tensor(WEIGHT_KEY + ".lora_B.weight").any()


def test_a_merged_adapter_is_saved_as_if_it_were_not(tmp_path):
    model = trained("dora")
    save_adapter(merge(model), tmp_path)
    assert torch.equal(load_adapter(base_model(), tmp_path)(TOKENS).logits, unmerge(model)(TOKENS).logits)


def test_a_half_precision_file_is_loaded_into_float32(saved):
    edit_weights(saved, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
    model = load_adapter(base_model(), saved)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(model(TOKENS).logits, trained("dora")(TOKENS).logits, rtol=0.01, atol=0.01)


def test_saving_again_replaces_the_old_adapter(saved):
    model = trained("lora")
    save_adapter(model, saved)
    assert torch.equal(load_adapter(base_model(), saved)(TOKENS).logits, model(TOKENS).logits)


# --- Errors: a model is left as it was ---


def assert_refused(folder, error, message, model=None):
    model = model or base_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    assert_refused(saved, FileNotFoundError, f"{name} is missing: give a folder with {WEIGHTS_FILE} and {CONFIG_FILE}")


def test_a_missing_folder_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere", FileNotFoundError, "nowhere/adapter_model.safetensors is missing")


def test_a_pickle_is_not_read(saved):
    (saved / WEIGHTS_FILE).rename(saved / "adapter_model.bin")
    assert_refused(saved, FileNotFoundError, "adapter_model.bin is a pickle and is not read")


@pytest.mark.parametrize("damage", ["truncated", "empty", "nonsense"])
def test_damaged_weights_are_refused(saved, damage):
    path = saved / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "nonsense": b"\xff" * 64}[damage])
    assert_refused(saved, ValueError, f"{WEIGHTS_FILE} is damaged or cut short")


@pytest.mark.parametrize("content", ["", '{"peft_type": "LO', b"\xff\xfe\xfd"])
def test_a_damaged_config_is_refused(saved, content):
    (saved / CONFIG_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(saved, ValueError, f"{CONFIG_FILE} is not valid JSON")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3': only 'LORA', with or without use_dora, can be loaded"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_qalora": True}, "settings that are not offered here: use_qalora=True; load it with PEFT instead"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_A.weight has shape \(4, 16\), expected \(8, 16\)"),
        ({"rank_pattern": {"q_proj": 0}}, "the rank of 'q_proj' must be a whole number above 0"),
        ({"rank_pattern": {"(": 4}}, rf"{CONFIG_FILE}: rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": [1]}, f"{CONFIG_FILE}: rank_pattern must map"),
        ({"alpha_pattern": {"q_proj": "x"}}, f"{CONFIG_FILE}: alpha_pattern: the alpha of 'q_proj'"),
        ({"Wdecompose_target_modules": [1]}, CONFIG_FILE),
        ({"Wdecompose_target_modules": 5}, CONFIG_FILE),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow=1"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ".*_proj"}, "target_modules must be a list of layer names"),
        ({"target_modules": None}, "target_modules must be a list of layer names"),
        ({"r": 0}, f"{CONFIG_FILE}: rank must be a whole number of at least 1"),
        ({"lora_alpha": "8"}, CONFIG_FILE),
        ({"lora_dropout": 2}, "dropout must be at least 0 and below 1"),
        ({"target_modules": ["c_attn"]}, "'c_attn' is not in the model: its linear layers are"),
        ({"r": 99}, "rank 99 is too large for module"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(saved, changes, message):
    edit_config(saved, **changes)
    assert_refused(saved, ValueError, message)


def test_a_config_that_is_no_object_is_refused(saved):
    (saved / CONFIG_FILE).write_text("[1, 2]")
    assert_refused(saved, ValueError, "peft_type None")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(WEIGHT_KEY + ".lora_B.weight"),
            f"lacks expected keys, 1 of them, such as {WEIGHT_KEY}.lora_B",
        ),
        (lambda t: t.update({"other.weight": torch.ones(1)}), "has unexpected keys, 1 of them, such as other.weight"),
        (
            lambda t: t.update({WEIGHT_KEY + ".lora_A.weight": torch.ones(4, 15)}),
            r"q_proj.lora_A.weight has shape \(4, 15\), expected \(4, 16\)",
        ),
        (
            lambda t: t.update({WEIGHT_KEY + ".lora_magnitude_vector": torch.ones(16, 1)}),
            r"lora_magnitude_vector has shape \(16, 1\), expected \(16,\)",
        ),
    ],
    ids=["missing", "unexpected", "A's shape", "m's shape"],
)
@pytest.mark.parametrize("attached", [False, True])
def test_weights_that_do_not_fit_are_refused(saved, change, message, attached):
    edit_weights(saved, change)
    assert_refused(saved, ValueError, message, attach(base_model(), CONFIGS["dora"]) if attached else None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig("lora", 4, 6), "has method 'dora' but the model's has 'lora'"),
        (AdapterConfig("dora", 2, 6), "has rank 4 but the model's has 2"),
        (AdapterConfig("dora", 4, 8), "has alpha 6 but the model's has 8"),  # the same shapes, another function
        (AdapterConfig("full"), "has method 'dora' but the model's has 'full'"),
        (AdapterConfig("dora", 4, 6, target_modules=("q_proj",)), "has unexpected keys"),
    ],
)
def test_attached_adapters_of_another_kind_are_refused(saved, config, message):
    assert_refused(saved, ValueError, message, attach(base_model(), config))


def test_nothing_is_loaded_into_a_merged_model(saved):
    assert_refused(saved, ValueError, "merged: unmerge before loading", merge(trained("dora")))


def test_a_model_without_adapters_is_not_saved(tmp_path):
    for model in (base_model(), attach(base_model(), AdapterConfig("full"))):
        with pytest.raises(ValueError, match="no adapters to save"):
            save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- Writing ---


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "adapter").write_text("in the way")
    with pytest.raises(OSError, match="could not be written .*adapter'"):
        save_adapter(trained("lora"), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "in the way"


def test_a_full_disk_is_named_and_leaves_the_old_adapter(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*free space on the disk or choose") as caught:
        save_adapter(trained("lora"), saved)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(saved))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("renamed", [0, 1])
def test_killed_between_the_files_there_is_no_mixture(saved, monkeypatch, renamed):
    replace, calls = os.replace, []

    def die(source, target):
        calls.append(target)
        if len(calls) > renamed:
            raise KeyboardInterrupt  # no handler of ours runs, as with SIGKILL
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(trained("lora"), saved)
    monkeypatch.setattr(os, "replace", replace)
    assert_refused(saved, FileNotFoundError, f"{CONFIG_FILE} is missing")
    save_adapter(trained("lora"), saved)  # and it can be written again
    assert sorted(os.listdir(saved)) == [CONFIG_FILE, WEIGHTS_FILE]
    assert len(adapted_modules(load_adapter(base_model(), saved))) == 2 * len(LLAMA_TARGETS)


def test_the_same_adapter_gives_the_same_config_file(tmp_path):
    for name in "ab":
        save_adapter(trained("dora"), tmp_path / name)
    assert (tmp_path / "a" / CONFIG_FILE).read_bytes() == (tmp_path / "b" / CONFIG_FILE).read_bytes()


def test_layers_of_any_module_can_be_saved(tmp_path):
    net = attach(nn.Sequential(nn.Linear(4, 3)), AdapterConfig("dora", 2, 4, target_modules=("0",)))
    save_adapter(net, tmp_path)
    loaded = load_adapter(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    assert torch.equal(loaded[0].lora_A, net[0].lora_A)
