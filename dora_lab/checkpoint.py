"""Adapters to and from PEFT's files: `adapter_model.safetensors` and `adapter_config.json`.

Keys are `base_model.model.<path>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank) and, for DoRA,
`.lora_magnitude_vector` (out,). Magnitude-only adapters are written as DoRA of rank 1 with B = 0, which is the same
function; the file's metadata says what they were.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_lab.adapters import AdapterConfig, LoRALinear, adapted_modules, attach

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# What PEFT can say in its configuration that would change the function and is not read here.
_PLAIN = {
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "use_rslora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "layers_to_transform": (None, []),
}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of `model` for PEFT and for `load_adapter`; each file is whole or not there.

    Raises ValueError if the model has no adapters or they are merged.
    """
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters to save: attach them first (a fully trained model is saved whole)")
    if any(module.merged for module in modules.values()):
        raise ValueError("the adapters are merged: unmerge the model before saving them")
    config: AdapterConfig = model.adapter_config
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        low_rank = isinstance(module, LoRALinear)
        out_features, in_features = module.base.weight.shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A if low_rank else torch.zeros(1, in_features)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B if low_rank else torch.zeros(out_features, 1)
        if hasattr(module, "magnitude"):
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = module.magnitude
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": config.rank or 1,
        "lora_alpha": config.alpha or 1,
        "lora_dropout": config.dropout,
        "use_dora": config.method != "lora",
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / (WEIGHTS + ".partial"), metadata={"format": "pt", "method": config.method})
    (folder / (CONFIG + ".partial")).write_text(json.dumps(written, indent=2) + "\n")
    for name in (WEIGHTS, CONFIG):
        (folder / (name + ".partial")).replace(folder / name)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Read an adapter that PEFT or `save_adapter` wrote; attaches it, or fills adapters of the same kind.

    Raises FileNotFoundError (a file is missing) or ValueError (damaged file, another kind of adapter, other keys or
    shapes than the model's adapters have). Nothing is filled in unless everything fits.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give the folder that save_adapter or PEFT wrote")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            method = (file.metadata() or {}).get("method")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): restore the file") from error
    config = _read_config(folder / CONFIG, method)
    if getattr(model, "adapter_config", None) is None:
        attach(model, config)
    elif model.adapter_config.method != config.method:
        raise ValueError(f"the model has {model.adapter_config.method} adapters, {folder} holds {config.method}")
    expected: dict[str, Tensor] = {}
    for name, module in adapted_modules(model).items():
        if isinstance(module, LoRALinear):
            expected[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            expected[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
        if hasattr(module, "magnitude"):
            expected[f"{PREFIX}{name}.lora_magnitude_vector"] = module.magnitude
    if config.method == "dora-magnitude":
        tensors = {key: value for key, value in tensors.items() if key.endswith("lora_magnitude_vector")}
    if odd := sorted(expected.keys() ^ tensors.keys()):
        where = "missing from the file" if odd[0] in expected else "not in the model"
        raise ValueError(f"{folder / WEIGHTS} does not fit the model: {len(odd)} keys differ, {odd[0]} is {where}")
    for key, parameter in expected.items():
        if tensors[key].shape != parameter.shape:
            shapes = f"{tuple(tensors[key].shape)} in the file, {tuple(parameter.shape)} in the model"
            raise ValueError(f"{folder / WEIGHTS} does not fit the model: {key} is {shapes}")
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])
    return model


def _read_config(path: Path, method: str | None) -> AdapterConfig:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore the file") from error
    if read.get("peft_type") != "LORA":
        raise ValueError(f"{path} is of peft_type {read.get('peft_type')!r}: only LORA (with or without DoRA) is read")
    for key, (plain, other) in _PLAIN.items():
        if read.get(key, plain) not in (plain, other):
            raise ValueError(f"{path}: {key} = {read[key]!r} is not supported")
    targets = read["target_modules"]
    if isinstance(targets, str):
        raise ValueError(f"{path}: target_modules is the pattern {targets!r}: list the module names instead")
    if method == "dora-magnitude":
        return AdapterConfig(method, target_modules=tuple(targets))
    kind = "dora" if read.get("use_dora") else "lora"
    return AdapterConfig(kind, read["r"], read["lora_alpha"], read.get("lora_dropout", 0.0), tuple(sorted(targets)))
