"""A Llama of two tiny layers with random weights, the same at every call, for tests of adapters around it."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def as_if_trained(model: nn.Module) -> nn.Module:
    """The model with everything that is trained moved a little."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
