"""Adapters to and from PEFT's files: `adapter_model.safetensors` and `adapter_config.json`.

A linear layer at <path> has the keys `base_model.model.<path>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank)
and, for DoRA, `.lora_magnitude_vector` (out,). PEFT reads what is written here and gives the same output, and the other
way round. PEFT has one `use_dora` for all modules; what it has no name for is written as DoRA that computes the same,
and the metadata of the safetensors file says what it is, so that it is read back as such here:

    m alone                     rank 1 with A = B = 0
    LoRA beside DoRA            m = ‖W0 + s·B·A‖, so that the gain is 1
    frozen by method_pattern    not in the file; the config names every adapted module
    started by PiSSA            an adapter of rank 2·r on W0 itself (`pissa`), the magnitude as it is; read back as that

Checkpoints of the authors' code (NVlabs/DoRA) are read as well: there m is `.weight_m_wdecomp.weight` (out, 1), the
config's peft_type is "DORA", and `Wdecompose_target_modules` have m alone.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dora_lab.adapters import Adapter, AdapterConfig, adapted_modules, attach, dora_norm, find_targets
from dora_lab.kernels import features_of
from dora_lab.pissa import onto_the_base

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
METHOD_KEY, HYBRID_KEY = "dora_lab.method", "dora_lab.hybrid"
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
_SAME = ("method", "rank", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "method_pattern")
# What the config of a hybrid says module by module; the metadata has it as it was attached.
_OF_A_HYBRID = ("method_pattern", "rank_pattern", "alpha_pattern", "target_modules")


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write the adapters of `model` to `folder`, which is made where it is missing; an adapter there is replaced.

    Killed at any moment, it leaves the old adapter, the new one, or no config file (which `load_adapter` reports);
    never a mixture. Raises ValueError if the model has no adapters, OSError naming the folder if it cannot be written.
    """
    modules = adapted_modules(model)
    if not modules:
        raise ValueError("the model has no adapters to save: attach them first, or save a full model as it is")
    config = _on_the_base(model.adapter_config)
    use_dora = _use_dora(config, modules)
    tensors = {
        PREFIX + name + suffix: value.detach().cpu().contiguous()
        for name, module in modules.items()
        for suffix, value in (_tensors(module) | _derived(module, use_dora)).items()
    }
    metadata = {"format": "pt", METHOD_KEY: config.method}
    if config.method_pattern:
        metadata[HYBRID_KEY] = json.dumps({name: getattr(config, name) for name in _OF_A_HYBRID})
    # the keys of a pattern stay in their order: the first that matches counts
    settings = json.dumps(_peft_config(model, config, use_dora), indent=2)
    contents = {WEIGHTS_FILE: save(tensors, metadata), CONFIG_FILE: (settings + "\n").encode()}
    _write_together(Path(folder), contents)


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Read the adapter in `folder` into `model` and return it; adapters are attached first if the model has none.

    The files may be PEFT's or `save_adapter`'s. The model stays as it was if anything is wrong. Raises
    FileNotFoundError for a missing file, and ValueError for: a file that is damaged, a config of another kind of
    adapter or with settings that are not offered here, missing or unexpected keys, wrong shapes, a method, rank or
    alpha other than the attached one's, a merged model, one whose base has lost its singular triples to PiSSA.
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
            for suffix, value in _tensors(module).items():  # what is derived from others is not read
                value.copy_(tensors[PREFIX + name + suffix])
    return model


def _translate_nvlabs(tensors: dict[str, Tensor], linears: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Give the tensors of an NVlabs checkpoint PEFT's names and shapes, in place; others are left as they are."""
    for name, linear in linears.items():
        magnitude = tensors.pop(PREFIX + name + NVLABS_MAGNITUDE, None)
        if magnitude is not None:
            tensors[PREFIX + name + ".lora_magnitude_vector"] = magnitude.flatten()  # (out, 1) -> (out,)
            if config.of_module(name).method == "dora-magnitude":
                for suffix, shape in _shapes(linear, config.of_module(name), True).items():
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
    lora_A, lora_B = (module.lora_A, module.lora_B) if module.start_A is None else onto_the_base(module)
    pair = {".lora_A.weight": lora_A, ".lora_B.weight": lora_B}
    return pair | ({".lora_magnitude_vector": module.magnitude} if hasattr(module, "magnitude") else {})


@torch.no_grad()
def _derived(module: Adapter, use_dora: bool) -> dict[str, Tensor]:
    """The magnitude with which DoRA computes what a LoRA module does, where other modules of the file have one."""
    if not use_dora or hasattr(module, "magnitude"):
        return {}
    return {".lora_magnitude_vector": dora_norm(module.effective_weight())}


def _use_dora(config: AdapterConfig, names: Iterable[str]) -> bool:
    """PEFT's one `use_dora`: whether any module has a magnitude."""
    return any(config.of_module(name).method != "lora" for name in names)


def _on_the_base(config: AdapterConfig) -> AdapterConfig:
    """The configuration under which what was saved is loaded: PiSSA's as twice the rank, at the same scaling."""
    if config.initialisation != "pissa":
        return config
    grown = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        initialisation="kaiming",
        rank=2 * config.rank,
        alpha=grown * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: grown * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _shapes(linear: nn.Module, own: AdapterConfig, use_dora: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors for an adapter around `linear`; `own` is the module's own configuration."""
    rank, (out_features, in_features) = own.rank or 1, features_of(linear)
    pair = {".lora_A.weight": (rank, in_features), ".lora_B.weight": (out_features, rank)}
    return pair | ({".lora_magnitude_vector": (out_features,)} if use_dora else {})


def _peft_config(model: nn.Module, config: AdapterConfig, use_dora: bool) -> dict:
    modules = adapted_modules(model)
    targets, ranks, alphas = config.target_modules, config.rank_pattern, config.alpha_pattern
    if config.method_pattern:  # module by module, which leaves no two keys that match the same
        own = {name: config.of_module(name) for name in modules}
        targets = tuple(modules)
        ranks = {re.escape(name): one.rank or 1 for name, one in own.items()}
        alphas = {re.escape(name): one.alpha or 1 for name, one in own.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": config.rank or 1,
        "lora_alpha": config.alpha or 1,
        "lora_dropout": config.dropout,
        "use_dora": use_dora,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": any(type(module.base).__name__ == "Conv1D" for module in modules.values()),
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
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
    own = {"dropout": settings.get("lora_dropout", 0.0), "target_modules": settings.get("target_modules")}
    if method != "dora-magnitude":
        own |= {"rank": settings.get("r"), "alpha": settings.get("lora_alpha")}
        own |= {"use_rslora": bool(settings.get("use_rslora"))}
        own |= {pattern: settings.get(pattern) or {} for pattern in ("rank_pattern", "alpha_pattern")}
    only_m = settings.get("Wdecompose_target_modules")  # NVlabs keeps the two lists apart
    try:
        if only_m and isinstance(own["target_modules"], list):
            own["target_modules"] = sorted({*own["target_modules"], *only_m})
            own["method_pattern"] = dict.fromkeys(map(re.escape, only_m), "dora-magnitude")
        return AdapterConfig(method, **own | json.loads(metadata.get(HYBRID_KEY, "{}")))
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
    if attached.initialisation == "pissa":
        raise ValueError(
            f"the model's adapters started by PiSSA, which took them out of its base: load the adapter in {folder} "
            "into the base model"
        )
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
    use_dora = _use_dora(config, linears)
    expected = {
        PREFIX + name + suffix: shape
        for name, linear in linears.items()
        for suffix, shape in _shapes(linear, config.of_module(name), use_dora).items()
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
