"""`speed_up` under PEFT models: the same outputs, gradients and files, and a way back."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dora_lab
from dora_lab.adapters import LLAMA_TARGETS

TOKENS = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))  # (batch, positions)


def peft_model(use_dora: bool = True, dropout: float = 0.0):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "use_dora": use_dora}
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=list(LLAMA_TARGETS), **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def gradients_of(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(7)  # the same dropout masks
    model.zero_grad()
    output = model(TOKENS, labels=TOKENS)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_stay_pefts(dropout):
    model = peft_model(dropout=dropout).train()
    expected = gradients_of(model)
    assert dora_lab.speed_up(model) is model
    found = gradients_of(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert dora_lab.slow_down(model) is model
    again = gradients_of(model)
    assert torch.equal(again[0], expected[0])


def test_low_rank_dropout_is_pefts_in_evaluation():
    model = peft_model(dropout=0.3).eval()
    expected = model(TOKENS).logits
    torch.testing.assert_close(dora_lab.speed_up(model, "low-rank")(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    logits, gradients = gradients_of(model.train())
    assert torch.isfinite(logits).all() and all(torch.isfinite(g).all() for g in gradients.values())


def test_the_files_are_the_same_to_the_bit(tmp_path):
    model = peft_model()
    model.save_pretrained(tmp_path / "before")
    dora_lab.speed_up(model).save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert load_file(tmp_path / "after" / "adapter_model.safetensors")


def test_merging_and_switching_off_remain_pefts():
    model = dora_lab.speed_up(peft_model().eval())
    expected = model(TOKENS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model(TOKENS).logits, expected)


def test_training_steps_stay_beside_pefts():
    models = [peft_model().train(), dora_lab.speed_up(peft_model().train())]
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(10):
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(models[0](TOKENS).logits, models[1](TOKENS).logits, rtol=1e-3, atol=1e-3)


def test_models_without_dora_are_refused():
    with pytest.raises(ValueError, match="no PEFT DoRA layer"):
        dora_lab.speed_up(peft_model(use_dora=False))
    with pytest.raises(ValueError, match="no PEFT DoRA layer"):
        dora_lab.speed_up(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not sped up"):
        dora_lab.slow_down(peft_model())
    with pytest.raises(ValueError, match="unknown dropout_on 'none'"):
        dora_lab.speed_up(peft_model(), "none")
