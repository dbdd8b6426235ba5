"""A base model and its tokenizer: the embedded mini-world's, a local folder, a hub id, or random weights of a shape.

Safetensors only.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from dora_lab.data import IGNORED
from dora_lab.files import sha256_of
from dora_lab.profiles import PROJECT
from dora_lab.shapes import Shape, find_shape

if TYPE_CHECKING:  # loaded when a model is, so that the command line starts quickly
    import torch
    from torch import Tensor
    from transformers import Cache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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


def load_base(
    base_model: str, dtype: str = "float32", device: str | torch.device = "cpu", **choices: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(causal language model in `dtype` on `device`, tokenizer with a pad token); choices: as for `load_model`.

    Raises what `load_tokenizer` and `load_model` raise, and ValueError for a tokenizer with more tokens than the model.
    """
    model = load_model(base_model, dtype, device, choices.get("revision"), choices.get("quantisation") or "none")
    tokenizer = load_tokenizer(base_model, choices.get("revision"), choices.get("tokenizer"))
    check_vocabulary(base_model, tokenizer, model.get_input_embeddings().num_embeddings)
    return model, tokenizer


def load_config(base_model: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a causal language model; of a hub id, this one small file is fetched.

    Raises FileNotFoundError (missing folder or file) or ValueError (unreadable, or not a causal language model).
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if is_random(base_model):
        return llama_config(find_shape(base_model))
    name, options = _place(base_model, revision)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"base model {name}: its configuration cannot be read ({first_line(error)})") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"base model {name} is a {config.model_type!r} model, which cannot generate text: "
            "give a causal language model such as a Llama"
        )
    return config


def load_model(
    base_model: str,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    quantisation: str = "none",
) -> PreTrainedModel:
    """The model in `dtype` on `device`; its linear layers in 8 or 4 bits if `quantisation` is not "none".

    `random:<shape>` is made on the device, in that precision, from the seed 0.
    Raises FileNotFoundError (missing folder or file) or ValueError (not a causal language model, weights that cannot
    be read or do not fit their configuration).
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from dora_lab.quantised import bitsandbytes_config, keep_layout, random_llama

    disable_progress_bar()
    config, number = load_config(base_model, revision), getattr(torch, dtype)
    if is_random(base_model):
        model = random_llama(config, number, device, quantisation)
    else:
        name, options = _place(base_model, revision)
        if quantisation != "none":
            options["quantization_config"] = bitsandbytes_config(quantisation, number)
        if quantisation != "none" or torch.device(device).type != "cpu":
            options["device_map"] = {"": device}
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=number, use_safetensors=True, output_loading_info=True, **options
            )
        except Exception as error:  # safetensors and transformers raise many kinds
            raise ValueError(f"base model {name}: its weights cannot be read ({first_line(error)})") from error
        if report["missing_keys"] or report.get("mismatched_keys"):
            missing = sorted(report["missing_keys"])[:3]
            raise ValueError(f"base model {name}: the weights do not fit the configuration (missing, e.g., {missing})")
    keep_layout(model)
    model.config.use_cache = False
    return model


def load_tokenizer(
    base_model: str, revision: str | None = None, tokenizer: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, or that of `tokenizer`, another base or folder; with a pad token.

    Raises FileNotFoundError for a missing folder, ValueError if there is none or it cannot be read.
    """
    from transformers import AutoTokenizer

    if tokenizer is None and is_random(base_model):
        raise ValueError(f"base model {base_model} has no tokenizer: set tokenizer to a folder or base that has one")
    name, options = _place(base_model, revision) if tokenizer is None else _tokenizer_place(tokenizer)
    folder = Path(name) if options["local_files_only"] else None
    try:
        if folder and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            if not (folder / "tokenizer.model").is_file():
                raise OSError("there is no tokenizer.json and no tokenizer.model: copy the tokenizer's files there")
            loaded = _from_sentencepiece(folder / "tokenizer.model")
        else:
            loaded = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"base model {name}: its tokenizer cannot be read ({first_line(error)})") from error
    if loaded.pad_token is None:
        loaded.pad_token = loaded.unk_token or loaded.eos_token
    return loaded


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """LLaMA's own file, with a begin token, as LLaMA was pretrained.

    Merges come in the order of the pieces' scores. In that of their numbers, as transformers reads the file, runs of
    spaces come too early and take the space from the word behind them.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ValueError(f"{path.name} is damaged ({first_line(error)})") from error
    numbers = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [
        (piece[:i], piece[i:])
        for piece in numbers
        for i in range(1, len(piece))
        if piece[:i] in numbers and piece[i:] in numbers
    ]
    merges.sort(key=lambda pair: (-pieces.get_score(numbers["".join(pair)]), -len(pair[0])))
    return LlamaTokenizer(vocab=numbers, merges=merges, add_bos_token=True)


def check_vocabulary(base_model: str, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise ValueError if the tokenizer has more tokens than the model has embeddings."""
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"base model {base_model}: the tokenizer has {len(tokenizer)} tokens, the model only {embeddings}: "
            "they do not belong together"
        )


def is_random(base_model: str) -> bool:
    """Whether random weights of a known shape are meant."""
    return base_model.startswith("random:")


def _place(base_model: str, revision: str | None) -> tuple[str, dict]:
    """(folder or hub id, how transformers is to load from there)."""
    folder = base_folder(base_model)
    options = {"trust_remote_code": False, "local_files_only": folder is not None}
    return str(folder or base_model), options if folder or not revision else options | {"revision": revision}


def _tokenizer_place(tokenizer: str) -> tuple[str, dict]:
    if tokenizer == "mini-world" or not Path(tokenizer).expanduser().is_dir():
        return _place(tokenizer, None)  # which says what is missing
    return str(Path(tokenizer).expanduser()), {"trust_remote_code": False, "local_files_only": True}


def llama_config(shape: Shape) -> PretrainedConfig:
    """The configuration of a Llama of that shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let every decoder layer keep its input alone and compute the rest again in the backward."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # older
    enable({"use_reentrant": False})


def answer_logits(
    model: PreTrainedModel, input_ids: Tensor, rows: Tensor, columns: Tensor, **packing: Tensor | Cache
) -> Tensor:
    """Logits for the token after each `input_ids[rows[i], columns[i]]`: (positions, vocabulary), float32.

    input_ids: (batch, longest), padded on the right. There is no mask: under causal attention no token sees what
    follows it. Only the positions that matter go through the output layer, which is most of the work of a small model,
    and most of the memory of a loss: the others are left out in front of it, whatever the model does behind it.
    packing: `attention_mask` (batch, 1, longest, seen), added to the scores, and `position_ids` (batch, longest) of
    rows that hold several continuations of one prompt; `past_key_values` of tokens that come before all rows.
    """

    def select(layer, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][rows, columns],)  # (batch, longest, hidden) -> (positions, hidden)

    within = getattr(model, "module", model)  # of DistributedDataParallel, which must be called itself
    hook = within.get_output_embeddings().register_forward_pre_hook(select)
    try:
        return model(input_ids=input_ids, use_cache=False, **packing).logits.float()
    finally:
        hook.remove()


def answer_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(cross-entropy summed over the labelled tokens of a batch of `trainer.collate`, how many those are)."""
    import torch.nn.functional as F

    labels = batch["labels"][:, 1:]  # (rows, longest - 1): the token after each position
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    logits = answer_logits(model, batch["input_ids"], rows, columns)  # (positions, vocabulary)
    return F.cross_entropy(logits, labels[rows, columns], reduction="sum"), len(rows)


def base_sha256(base_model: str, revision: str | None = None, tokenizer: str | None = None) -> str:
    """One hash over configuration, weights and tokenizer of a local base.

    For a hub id, of the id and its revision; for random weights, of the shape's name. A tokenizer of its own counts.
    """
    folder = None if is_random(base_model) else base_folder(base_model)
    digest = hashlib.sha256(b"" if folder else base_model.encode())
    if revision and not folder:
        digest.update(f"@{revision}".encode())
    _add_files(digest, folder, (".json", ".safetensors", ".model"))
    if tokenizer is not None:
        place, options = _tokenizer_place(tokenizer)
        if options["local_files_only"]:
            _add_files(digest, Path(place), (".json", ".model"))
        else:
            digest.update(f"\0tokenizer {tokenizer}".encode())
    return digest.hexdigest()


def _add_files(digest, folder: Path | None, kinds: tuple[str, ...]) -> None:
    for path in sorted(folder.iterdir()) if folder else ():
        if path.suffix in kinds:
            digest.update(path.name.encode() + b"\0" + _file_sha256(path, path.stat().st_mtime_ns))


@functools.lru_cache
def _file_sha256(path: Path, changed_ns: int) -> bytes:
    return bytes.fromhex(sha256_of(path))


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
