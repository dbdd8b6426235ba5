"""What would make a run fail after hours is looked for first: access to the base, room on the disk, room in memory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dora_lab.machine import memory
from dora_lab.models import base_folder, first_line, is_random, load_config, load_tokenizer
from dora_lab.shapes import Shape, find_shape
from dora_lab.specs import RunSpec

if TYPE_CHECKING:  # the planner needs PyTorch, and small runs need no planner
    from dora_lab.memory import Plan

SHORTEST_TOKENS = 128  # a run whose cut-off is not known yet has sequences of this length at least
ALWAYS_FITS_PARAMETERS = 50_000_000
BASE_FILES = ["*.json", "*.safetensors", "*.model"]  # what loading a base and its tokenizer reads
HUB_FILE = "https://huggingface.co/{}"


def preflight(spec: RunSpec) -> None:
    """See that the base can be had and that the run fits, before anything large is fetched or trained.

    Raises FileNotFoundError, ValueError or OSError saying what to do: a base that is missing, gated or without
    safetensors, a full disk, a tokenizer that is missing, a plan that does not fit.
    """
    check_base(spec)
    check_memory(spec)


def check_base(spec: RunSpec) -> None:
    """Raise as `preflight` does unless the base model is there or can be downloaded. Asks the hub, fetches nothing."""
    if spec.tokenizer is not None or is_random(spec.base_model):
        load_tokenizer(spec.base_model, spec.revision, spec.tokenizer)
    if is_random(spec.base_model):
        find_shape(spec.base_model)
    elif base_folder(spec.base_model) is None and not _is_cached(spec.base_model, spec.revision):
        needed = _bytes_to_download(spec.base_model, spec.revision)
        folder = _existing(_hub_cache())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"base model {spec.base_model} has {needed / 1e9:.1f} GB of weights, {folder} has {free / 1e9:.1f} GB "
                "free: free space there, or let HF_HOME name another folder"
            )


def fetch_base(spec: RunSpec) -> None:
    """Bring a base model of the hub into its cache, whole, so that no run needs the network."""
    if is_random(spec.base_model) or base_folder(spec.base_model):
        return
    if not _is_cached(spec.base_model, spec.revision):
        from huggingface_hub import snapshot_download

        snapshot_download(spec.base_model, revision=spec.revision, allow_patterns=BASE_FILES)
    load_config(spec.base_model, spec.revision)
    load_tokenizer(spec.base_model, spec.revision, spec.tokenizer)


def check_memory(spec: RunSpec, tokens: int | None = None) -> None:
    """Raise ValueError, with what the planner would change, if the run cannot fit on the GPU, or without one in memory.

    tokens: of the longest example; without it the cut-off, or `SHORTEST_TOKENS` where that is still unknown.
    """
    planned = plan_of(spec, tokens=tokens) if is_large(spec) else None
    if planned is None:
        return
    from dora_lab import processes, shards

    needed = planned.total
    if shards.asked_for():  # of the base a process keeps its part; the rest of the plan stays a bound
        needed -= planned.weights - planned.weights // processes.count()
    where, room = _room(planned.job.device)
    if needed > room:
        raise ValueError(
            f"{spec.base_model} with {planned.job.name} needs {needed / 1e9:.1f} GB, {where} has "
            f"{room / 1e9:.1f} GB free: {advice(planned)}"
        )


def is_large(spec: RunSpec) -> bool:
    """Whether the base is large enough for its memory to be a question."""
    shape = _shape(spec)
    return shape is not None and shape.parameters >= ALWAYS_FITS_PARAMETERS


def plan_of(spec: RunSpec, tokens: int | None = None, micro: int | None = None) -> Plan | None:
    """The planner's view of a run, for sequences of `tokens` tokens; None for a model or a rank it knows nothing of."""
    import torch

    from dora_lab.memory import ANSWER_TOKENS, plan

    shape = _shape(spec)
    if shape is None:
        return None
    if tokens is None:
        tokens = SHORTEST_TOKENS if spec.cutoff_tokens == "auto" else spec.cutoff_tokens
    micro = micro or spec.micro_batch_size or spec.batch_size
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    low_rank = spec.method in ("lora", "dora")
    try:
        return plan(
            shape,
            method=spec.method if low_rank or spec.method == "full" else "lora",
            rank=max(spec.rank, *spec.rank_pattern.values(), 1) if low_rank else 1,  # m alone has less than rank 1 has
            batch=max(1, micro // processes),
            length=tokens,
            target_modules=tuple(spec.target_modules),
            dropout=spec.dropout,
            checkpointing=spec.gradient_checkpointing,
            base_precision=spec.dtype if spec.quantisation == "none" else spec.quantisation,
            optimizer=spec.optimizer,
            accumulation=spec.examples_per_step // micro,
            logit_columns=None if spec.train_on_prompt else min(tokens, ANSWER_TOKENS),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except ValueError:
        return None


def advice(planned: Plan) -> str:
    """What the planner would change, the change that saves most first, with what would then be needed."""
    from dora_lab.memory import changes

    found = [f"{name} ({changed.total / 1e9:.1f} GB)" for name, changed in changes(planned)[:3]]
    keys = "gradient_checkpointing, quantisation, micro_batch_size and optimizer are keys of a profile"
    return f"what would change that: {'; '.join(found)} ({keys})" if found else "take a smaller model"


def _shape(spec: RunSpec) -> Shape | None:
    folder = None if is_random(spec.base_model) else base_folder(spec.base_model)
    try:
        if folder or is_random(spec.base_model):
            return find_shape(str(folder or spec.base_model))
        return Shape.of(load_config(spec.base_model, spec.revision), spec.base_model)
    except ValueError:  # no Llama, or unreadable, which loading will say
        return None


def _room(device: str) -> tuple[str, int]:
    if device == "cuda":
        import torch

        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # kept by PyTorch, and free for it
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] + unused
    total, available = memory()
    return "this machine's memory", next((size for size in (available, total) if size is not None), sys.maxsize)


def _is_cached(base_model: str, revision: str | None) -> bool:
    """Whether all weights of a hub id are in the hub's cache."""
    import json

    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> str | None:
        path = try_to_load_from_cache(base_model, name, revision=revision)
        return path if isinstance(path, str) else None

    index = cached("model.safetensors.index.json")
    if index is None:
        return cached("model.safetensors") is not None
    return all(cached(name) for name in set(json.loads(Path(index).read_text())["weight_map"].values()))


def _bytes_to_download(base_model: str, revision: str | None) -> int:
    """Bytes of the safetensors files of a hub id, after seeing that they may be fetched."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = HUB_FILE.format(base_model)
    by_hand = (
        f"fetch it elsewhere with `hf download {base_model}{f' --revision {revision}' if revision else ''} --local-dir "
        "FOLDER` and give that folder as base_model"
    )
    try:
        api = HfApi()
        api.auth_check(base_model)
        files = api.model_info(base_model, revision=revision, files_metadata=True).siblings
    except GatedRepoError as error:
        raise ValueError(
            f"base model {base_model} is gated: accept its licence at {page} and log in with `hf auth login`, or "
            f"{by_hand}"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"base model {base_model} has no revision {revision!r}: see {page}/commits/main") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"base model {base_model} is not on the hub, or not for you to see: check the name at {page}, or give a "
            "local folder beginning with ./ as base_model"
        ) from error
    except Exception as error:  # no network, a proxy, HF_HUB_OFFLINE: each client raises its own
        reason = first_line(error)
        raise FileNotFoundError(
            f"base model {base_model} is not in {_hub_cache()} and the hub cannot be asked ({reason:.200}): {by_hand}"
        ) from error
    weights = [file.size or 0 for file in files if file.rfilename.endswith(".safetensors")]
    if not weights:
        raise ValueError(
            f"base model {base_model} has no .safetensors weights, the only kind that is loaded: see {page}"
        )
    return sum(weights)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
