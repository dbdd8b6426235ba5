"""A base model and its tokenizer: the embedded mini-world's, a local folder, or a hub id. Safetensors only."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from dora_lab.profiles import PROJECT

if TYPE_CHECKING:  # loaded when a model is, so that the command line starts quickly
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

MINI_WORLD = PROJECT / "data" / "miniworld" / "base"


def base_folder(base_model: str) -> Path | None:
    """The local folder of a base model, or None for a hub id.

    Raises FileNotFoundError if a folder is meant and missing, or lacks its configuration or weights.
    """
    if base_model == "mini-world":
        folder = MINI_WORLD
    elif Path(base_model).expanduser().exists() or base_model.startswith((".", "/", "~")):
        folder = Path(base_model).expanduser()
    else:
        return None
    advice = "run `dora-lab pretrain` or restore data/miniworld" if folder == MINI_WORLD else "check the path"
    if not folder.is_dir():
        raise FileNotFoundError(f"base model folder {folder} does not exist: {advice}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"base model folder {folder} has no config.json: {advice}")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"base model folder {folder} has no .safetensors weights: {advice}")
    return folder


def load_base(base_model: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(causal language model in `dtype`, tokenizer with a pad token).

    Raises FileNotFoundError (missing folder or file) or ValueError (not a causal language model, weights that cannot
    be read or do not fit their configuration, no tokenizer, a tokenizer with more tokens than the model).
    """
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaTokenizer,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = base_folder(base_model)
    name = str(folder or base_model)
    options = {"trust_remote_code": False, "local_files_only": folder is not None}
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"base model {name}: its configuration cannot be read ({_first_line(error)})") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"base model {name} is a {config.model_type!r} model, which cannot generate text: "
            "give a causal language model such as a Llama"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # safetensors and transformers raise many kinds
        raise ValueError(f"base model {name}: its weights cannot be read ({_first_line(error)})") from error
    if report["missing_keys"] or report.get("mismatched_keys"):
        missing = sorted(report["missing_keys"])[:3]
        raise ValueError(f"base model {name}: the weights do not fit the configuration (missing, e.g., {missing})")
    try:
        if folder and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            if not (folder / "tokenizer.model").is_file():
                raise OSError("there is no tokenizer.json and no tokenizer.model: copy the tokenizer's files there")
            # LLaMA's own file says nothing of how it is used: with a begin token, as LLaMA was pretrained
            tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"base model {name}: its tokenizer cannot be read ({_first_line(error)})") from error
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"base model {name}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    model.config.use_cache = False
    return model, tokenizer


def answer_logits(
    model: PreTrainedModel, input_ids: Tensor, rows: Tensor, columns: Tensor, **packing: Tensor | Cache
) -> Tensor:
    """Logits for the token after each `input_ids[rows[i], columns[i]]`: (positions, vocabulary), float32.

    input_ids: (batch, longest), padded on the right. There is no mask: under causal attention no token sees what
    follows it. Only the columns that matter go through the output layer, which is most of the work of a small model.
    packing: `attention_mask` (batch, 1, longest, seen), added to the scores, and `position_ids` (batch, longest) of
    rows that hold several continuations of one prompt; `past_key_values` of tokens that come before all rows.
    """
    import torch

    kept = columns.unique()  # (kept,) sorted
    output = model(input_ids=input_ids, use_cache=False, logits_to_keep=kept, **packing)
    logits = output.logits  # (batch, kept, vocabulary)
    return logits[rows, torch.searchsorted(kept, columns.contiguous())].float()  # (positions, vocabulary)


def base_sha256(base_model: str) -> str:
    """One hash over configuration, weights and tokenizer of a local base; for a hub id, of the id itself."""
    folder = base_folder(base_model)
    digest = hashlib.sha256(b"" if folder else base_model.encode())
    for path in sorted(folder.iterdir()) if folder else ():
        if path.suffix in (".json", ".safetensors", ".model"):
            digest.update(path.name.encode() + b"\0" + _file_sha256(path, path.stat().st_mtime_ns))
    return digest.hexdigest()


@functools.lru_cache
def _file_sha256(path: Path, changed_ns: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
