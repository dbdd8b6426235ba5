"""Base models: what loads, what is refused, and logits at some positions only."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from dora_lab.models import answer_logits, base_sha256, load_base


@pytest.fixture
def copied(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_comes_in_the_precision_asked_for_with_its_tokenizer(tiny_base, dtype):
    model, tokenizer = load_base(str(tiny_base), dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert len(tokenizer) == model.config.vocab_size and tokenizer.pad_token is not None


def test_the_mini_worlds_base_loads():
    model, tokenizer = load_base("mini-world")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters <= 3_000_000 and next(model.parameters()).dtype == torch.float32
    ids = tokenizer("Please answer the following question with true or false")["input_ids"]
    assert tokenizer.unk_token_id not in ids


def test_logits_at_some_positions_are_the_models_own(tiny_base):
    model, _ = load_base(str(tiny_base))
    ids = torch.randint(3, model.config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    rows, columns = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([3, 9, 5, 0, 9])
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[rows, columns]  # (5, vocabulary)
    torch.testing.assert_close(answer_logits(model, ids, rows, columns), expected)


def test_what_stands_behind_a_position_does_not_change_its_logits(tiny_base):
    model, _ = load_base(str(tiny_base))
    ids = torch.randint(3, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids[:, :8], torch.zeros_like(ids[:, 8:])], dim=1)  # (1, 12)
    at = torch.tensor([0]), torch.tensor([7])
    torch.testing.assert_close(answer_logits(model, ids, *at), answer_logits(model, padded, *at))


def test_the_hash_moves_with_the_weights_and_not_with_the_place(tiny_base, copied):
    assert base_sha256(str(copied)) == base_sha256(str(tiny_base))
    weights = load_file(copied / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert base_sha256(str(copied)) != base_sha256(str(tiny_base))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no .safetensors weights"),
    ],
)
def test_a_missing_file_is_named(copied, name, message):
    (copied / name).unlink()
    for use in (load_base, base_sha256):
        with pytest.raises(FileNotFoundError, match=message):
            use(str(copied))


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="/nowhere/base does not exist: check the path"):
        load_base("/nowhere/base")


def test_a_folder_without_a_tokenizer_is_named(copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="its tokenizer cannot be read .*copy the tokenizer's files there"):
        load_base(str(copied))


def test_a_damaged_tokenizer_is_named(copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    (copied / "tokenizer.model").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="its tokenizer cannot be read .tokenizer.model is damaged"):
        load_base(str(copied))


@pytest.mark.parametrize(
    "other",
    [
        lambda: BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)),
        lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    ],
    ids=["encoder", "encoder-decoder"],
)
def test_a_model_of_the_wrong_kind_is_refused(copied, other):
    shutil.rmtree(copied)
    other().save_pretrained(copied)
    with pytest.raises(ValueError, match="causal language model|do not fit the configuration"):
        load_base(str(copied))


def test_weights_of_another_size_or_cut_short_are_refused(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="its weights cannot be read"):
        load_base(str(copied))
    path.write_bytes(whole)
    config = json.loads((copied / "config.json").read_text()) | {"hidden_size": 64}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights"):
        load_base(str(copied))


def test_weights_that_lack_a_layer_are_refused(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit the configuration.*layers.1.mlp.up_proj"):
        load_base(str(copied))


def test_a_broken_or_unknown_configuration_is_refused(copied):
    (copied / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ValueError, match="its configuration cannot be read"):
        load_base(str(copied))
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match="its configuration cannot be read"):
        load_base(str(copied))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copied):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"extra{i}": len(vocabulary) + i for i in range(5)}
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="they do not belong together"):
        load_base(str(copied))
