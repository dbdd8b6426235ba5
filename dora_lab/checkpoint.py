"""Adapters to and from PEFT's files: `adapter_model.safetensors` and `adapter_config.json`.

A linear layer at <path> has the keys `base_model.model.<path>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank)
and, for DoRA, `.lora_magnitude_vector` (out,). PEFT reads what is written here and gives the same output, and the other
way round. A module with m alone has no name in PEFT: it is written as DoRA of rank 1 with A = B = 0, and the metadata
of the safetensors file says what it is, so that it is read back as such here.

Checkpoints of the authors' code (NVlabs/DoRA) are read as well: there m is `.weight_m_wdecomp.weight` (out, 1), the
config's peft_type is "DORA", and `Wdecompose_target_modules` have m alone.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dora_lab.adapters import Adapter, AdapterConfig, adapted_modules, attach, find_targets
from dora_lab.kernels import features_of

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
METHOD_KEY, MAGNITUDE_ONLY_KEY = "dora_lab.method", "dora_lab.magnitude_only"
NVLABS_MAGNITUDE = ".weight_m_wdecomp.weight"

# Settings of PEFT's LoraConfig that do not change what a loaded adapter computes, and those that are read here.
# Any other setting that is switched on is refused.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "dora_simple", "fan_in_fan_out", "inference_mode", "megatron_core",
    "merge_weights", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "Wdecompose_target_modules", "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout",
    "peft_type", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
_SAME = ("method", "rank", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "magnitude_only")


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write the adapters of `model` to `folder`, which is made where it is missing; an adapter there is replaced.

    Killed at any moment, it leaves the old adapter, the new one, or no config file (which `load_adapter` reports);
    never a mixture. Raises ValueError if the model has no adapters, OSError naming the folder if it cannot be written.
    """
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters to save: attach them first, or save a full model as it is")
    tensors = {
        PREFIX + name + suffix: value.detach().cpu().contiguous()
        for name, module in modules.items()
        for suffix, value in _tensors(module).items()
    }
    config = model.adapter_config
    metadata = {"format": "pt", METHOD_KEY: config.method, MAGNITUDE_ONLY_KEY: json.dumps(config.magnitude_only)}
    contents = {
        WEIGHTS_FILE: save(tensors, metadata),
        CONFIG_FILE: (json.dumps(_peft_config(model), indent=2, sort_keys=True) + "\n").encode(),
    }
    _write_together(Path(folder), contents)


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Read the adapter in `folder` into `model` and return it; adapters are attached first if the model has none.

    The files may be PEFT's or `save_adapter`'s. The model stays as it was if anything is wrong. Raises
    FileNotFoundError for a missing file, and ValueError for: a file that is damaged, a config of another kind of
    adapter or with settings that are not offered here, missing or unexpected keys, wrong shapes, a method, rank or
    alpha other than the attached one's, a merged model.
    """
    folder = Path(folder)
    tensors, metadata = _read_weights(folder)
    config = _read_config(folder, metadata)
    attached = getattr(model, "adapter_config", None)
    if attached is None:
        linears = find_targets(model, config)
    else:
        _check_same_adapter(attached, config, folder)
        modules = adapted_modules(model)
        if any(module.merged for module in modules.values()):
            raise ValueError("the model's adapters are merged: unmerge before loading others")
        linears = {name: module.base for name, module in modules.items()}
    _translate_nvlabs(tensors, linears, config)
    _check_tensors(tensors, linears, config, folder / WEIGHTS_FILE)
    if attached is None:
        attach(model, config)
    with torch.no_grad():
        for name, module in adapted_modules(model).items():
            for suffix, value in _tensors(module).items():
                value.copy_(tensors[PREFIX + name + suffix])
    return model


def _translate_nvlabs(tensors: dict[str, Tensor], linears: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Give the tensors of an NVlabs checkpoint PEFT's names and shapes, in place; others are left as they are."""
    for name, linear in linears.items():
        magnitude = tensors.pop(PREFIX + name + NVLABS_MAGNITUDE, None)
        if magnitude is not None:
            tensors[PREFIX + name + ".lora_magnitude_vector"] = magnitude.flatten()  # (out, 1) -> (out,)
            if config.of_module(name).method == "dora-magnitude":
                for suffix, shape in _shapes(linear, config.of_module(name)).items():
                    tensors.setdefault(PREFIX + name + suffix, magnitude.new_zeros(shape))


def _tensors(module: Adapter) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names; rank-1 zeros stand in where m is all there is."""
    if not hasattr(module, "lora_A"):
        out_features, in_features = features_of(module.base)
        return {
            ".lora_A.weight": module.magnitude.new_zeros(1, in_features),
            ".lora_B.weight": module.magnitude.new_zeros(out_features, 1),
            ".lora_magnitude_vector": module.magnitude,
        }
    pair = {".lora_A.weight": module.lora_A, ".lora_B.weight": module.lora_B}
    return pair | ({".lora_magnitude_vector": module.magnitude} if hasattr(module, "magnitude") else {})


def _shapes(linear: nn.Module, own: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of `_tensors` for an adapter around `linear`; `own` is the module's own configuration."""
    rank, (out_features, in_features) = own.rank or 1, features_of(linear)
    pair = {".lora_A.weight": (rank, in_features), ".lora_B.weight": (out_features, rank)}
    return pair | ({".lora_magnitude_vector": (out_features,)} if own.method != "lora" else {})


def _peft_config(model: nn.Module) -> dict:
    config, only_m = model.adapter_config, dict.fromkeys(model.adapter_config.magnitude_only, 1)
    modules = adapted_modules(model).values()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": config.rank or 1,
        "lora_alpha": config.alpha or 1,
        "lora_dropout": config.dropout,
        "use_dora": config.method != "lora",
        "target_modules": sorted(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": any(type(module.base).__name__ == "Conv1D" for module in modules),
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "rank_pattern": only_m | config.rank_pattern,
        "alpha_pattern": only_m | config.alpha_pattern,
    }


def _read_config(folder: Path, metadata: dict[str, str]) -> AdapterConfig:
    """PEFT's or NVlabs' config as ours. `metadata` is the weights': only a file written here names its method."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a folder with {WEIGHTS_FILE} and {CONFIG_FILE}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}): save the adapter again") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind not in ("LORA", "DORA"):
        raise ValueError(f"{path} has peft_type {kind!r}: only 'LORA', with or without use_dora, can be loaded")
    refused = sorted(key for key in settings.keys() - _WITHOUT_EFFECT - _READ if settings[key])
    if settings.get("bias", "none") != "none":
        refused.append("bias")
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):  # others, as PiSSA, change W0 itself
        refused.append("init_lora_weights")
    if refused:
        wrong = ", ".join(f"{key}={settings[key]!r}" for key in refused)
        raise ValueError(f"{path} has settings that are not offered here: {wrong}; load it with PEFT instead")
    method = metadata.get(METHOD_KEY, "dora" if settings.get("use_dora") or kind == "DORA" else "lora")
    only_m = json.loads(metadata.get(MAGNITUDE_ONLY_KEY, "[]")) + (settings.get("Wdecompose_target_modules") or [])
    own = {"dropout": settings.get("lora_dropout", 0.0), "target_modules": settings.get("target_modules")}
    if method != "dora-magnitude":
        own |= {"rank": settings.get("r"), "alpha": settings.get("lora_alpha"), "magnitude_only": tuple(only_m)}
        own |= {"use_rslora": bool(settings.get("use_rslora"))}
        for pattern in ("rank_pattern", "alpha_pattern"):
            own[pattern] = {k: value for k, value in (settings.get(pattern) or {}).items() if k not in only_m}
    if kind == "DORA" and only_m and isinstance(own["target_modules"], list):  # NVlabs keeps the two lists apart
        own["target_modules"] = sorted({*own["target_modules"], *only_m})
    try:
        return AdapterConfig(method, **own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle and is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise FileNotFoundError(f"{path} is missing{pickled}: give a folder with {WEIGHTS_FILE} and {CONFIG_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): save or copy the adapter again") from error


def _check_same_adapter(attached: AdapterConfig, config: AdapterConfig, folder: Path) -> None:
    for setting in _SAME:
        ours, theirs = getattr(attached, setting), getattr(config, setting)
        if ours != theirs:
            raise ValueError(
                f"the adapter in {folder} has {setting} {theirs!r} but the model's has {ours!r}: "
                "load it into the base model, or attach the same configuration"
            )


def _check_tensors(
    tensors: dict[str, Tensor], linears: dict[str, nn.Module], config: AdapterConfig, path: Path
) -> None:
    expected = {
        PREFIX + name + suffix: shape
        for name, linear in linears.items()
        for suffix, shape in _shapes(linear, config.of_module(name)).items()
    }
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    for what, keys in (("lacks expected", missing), ("has unexpected", unexpected)):
        if keys:
            raise ValueError(
                f"{path} {what} keys, {len(keys)} of them, such as {min(keys)}: "
                "it belongs to another model or to other target modules"
            )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}, expected {shape}: "
                "it belongs to another model or to another rank"
            )


def _write_together(folder: Path, contents: dict[str, bytes]) -> None:
    """Write all files or none. The last is taken away first and put back last: with it there, all are whole."""
    partial = {folder / name: folder / f".{name}.partial" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, temporary in partial.items():
            with open(temporary, "wb") as file:
                file.write(contents[path.name])
                file.flush()
                os.fsync(file.fileno())
        path.unlink(missing_ok=True)
        for path, temporary in partial.items():
            os.replace(temporary, path)
    except OSError as error:
        if folder.is_dir():
            for temporary in partial.values():
                temporary.unlink(missing_ok=True)
        advice = "free space on the disk or choose another folder"
        raise OSError(
            error.errno, f"the adapter could not be written ({error.strerror}): {advice}", str(folder)
        ) from error
