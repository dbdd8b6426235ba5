"""A frozen base in 8 or 4 bits (QLoRA, arXiv 2305.14314), read from 16-bit weights or made at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

QUANTISATIONS = ("int8", "nf4", "nf4-double")


def bitsandbytes_config(quantisation: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` needs to load 16-bit weights in 8 or 4 bits; products are computed in `dtype`.

    nf4-double quantises the scales of the blocks too. Raises ValueError for an unknown name.
    """
    from transformers import BitsAndBytesConfig

    _check(quantisation)
    if quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=quantisation == "nf4-double",
    )


def random_llama(
    config: PretrainedConfig, dtype: torch.dtype, device: str | torch.device = "cpu", quantisation: str = "none"
) -> PreTrainedModel:
    """A causal language model with random weights, made on the device in `dtype`; the same one every time.

    Raises ValueError for an unknown quantisation.
    """
    from transformers import AutoModelForCausalLM

    if quantisation != "none":
        _check(quantisation)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantisation != "none":
        quantise(model, quantisation, dtype, device)
    return model.eval()


def quantise(model: nn.Module, quantisation: str, dtype: torch.dtype, device: str | torch.device) -> None:
    """Put every linear layer but the output layer into 8 or 4 bits, in place, one after another."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name.endswith("lm_head"):
            continue
        shape, weight = (module.in_features, module.out_features), module.weight.data.cpu()
        if quantisation == "int8":
            layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, device="meta")
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            statistics = quantisation == "nf4-double"
            layer = bnb.nn.Linear4bit(*shape, False, dtype, statistics, quant_type="nf4", device="meta")
            layer.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=statistics, quant_type="nf4"
            )
        model.set_submodule(name, layer.to(device))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantisation != "int8", quantisation == "int8"  # PEFT looks here


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they were quantised.

    On some CPUs bitsandbytes packs them anew, in place, at the first evaluation: for whole blocks only, and in a way
    that its own dequantisation, which a DoRA norm needs, does not read.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _check(quantisation: str) -> None:
    if quantisation not in QUANTISATIONS:
        raise ValueError(f"unknown quantisation {quantisation!r}: choose one of {', '.join(QUANTISATIONS)}")
