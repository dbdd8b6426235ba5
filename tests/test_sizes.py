"""Counts by module and lengths of prompts: the counts are the model's own, and the figures say what they show."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_lab import sizes
from dora_lab.adapters import AdapterConfig, attach, trainable_parameters


@pytest.fixture
def model():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=3, **shape))


@pytest.mark.parametrize("method, rank", [("lora", 4), ("dora", 4), ("dora-magnitude", None)])
def test_the_parts_add_up_to_what_is_trained(model, method, rank):
    attach(model, AdapterConfig(method, rank, rank))
    table = sizes.parameters_by_module(model)
    assert list(table["module"]) == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert set(table["count"]) == {3}
    assert table[["A", "B", "m"]].to_numpy().sum() == trainable_parameters(model)[0]
    row = table.set_index("module").loc["k_proj"]
    assert (row["out"], row["in"], row["W0"]) == (16, 32, 3 * 16 * 32)
    assert row["m"] == (0 if method == "lora" else 3 * 16) and row["A"] == 3 * 32 * (rank or 0)


def test_a_model_without_adapters_is_an_error(model):
    with pytest.raises(ValueError, match="attach them first"):
        sizes.parameters_by_module(model)


def test_every_bar_is_in_the_alt_text(model):
    table = sizes.parameters_by_module(attach(model, AdapterConfig("dora", 4, 8)))
    figure = sizes.parameter_bars(table, "a toy")
    assert len(figure.axes[0].patches) == 15
    alt = sizes.parameter_bars_alt(table, "a toy")
    assert "a toy" in alt and f"down_proj: A {4 * 48 * 3}, B {4 * 32 * 3}, m 96" in alt


def test_lengths_are_counted_against_the_cut_off():
    lengths = {"boolq": [10, 20, 30, 40], "hellaswag": [100, 300]}
    alt = sizes.length_curves_alt(lengths, 30)
    assert "BoolQ: median 25 tokens, longest 40, 25.0 % longer than 30" in alt
    assert "HellaSwag: median 200 tokens, longest 300, 100.0 % longer than 30" in alt
    curve = sizes.length_curves(lengths, 30).axes[0].lines[0]
    assert list(curve.get_xdata()) == [0, 10, 20, 30, 40] and list(curve.get_ydata()) == [100, 75, 50, 25, 0]
