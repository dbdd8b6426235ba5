"""The shapes of Llama models, by hand: enough to count parameters and bytes without a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family. All sizes are numbers of features, `layers` and `heads` are counts.

    kv_heads < heads is grouped-query attention; tied: the output layer is the embedding. Raises ValueError for sizes
    that make no such model.
    """

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False

    def __post_init__(self):
        for field in ("vocabulary", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim"):
            _check_count(self.name, field, getattr(self, field))
        if self.heads % self.kv_heads:
            raise ValueError(f"shape {self.name}: {self.heads} heads do not share {self.kv_heads} key and value heads")

    @classmethod
    def of(cls, config: Any, name: str = "") -> "Shape":
        """From a transformers configuration, or the mapping in its config.json.

        Raises ValueError for a model that is not of the Llama family, or sizes that make none.
        """
        if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
            raise ValueError(f"a configuration is a mapping, got {config!r:.80}: give that of a Llama model")
        values = config if isinstance(config, Mapping) else config.to_dict()
        if values.get("model_type") != "llama":
            raise ValueError(f"the planner knows Llama models, got model_type {values.get('model_type')!r}")
        try:
            name = name or values.get("_name_or_path") or "llama"
            hidden, heads = values["hidden_size"], values["num_attention_heads"]
            for field, value in (("hidden", hidden), ("heads", heads)):  # before one is divided by the other
                _check_count(name, field, value)
            return cls(
                name,
                vocabulary=values["vocab_size"],
                hidden=hidden,
                intermediate=values["intermediate_size"],
                layers=values["num_hidden_layers"],
                heads=heads,
                kv_heads=values.get("num_key_value_heads") or heads,
                head_dim=values.get("head_dim") or hidden // heads,
                tied=bool(values.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise ValueError(f"the configuration has no {error}: give that of a Llama model") from error

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{name: (out, in)} of the linear layers of one decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def layer_parameters(self) -> int:
        """Numbers in one decoder layer: its linear layers and two norms."""
        return sum(out * inp for out, inp in self.linears.values()) + 2 * self.hidden

    @property
    def outer_parameters(self) -> int:
        """Numbers outside of the decoder layers: embedding, last norm, output layer."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer_parameters + self.outer_parameters


def _check_count(name: str, field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"shape {name}: {field} must be a whole number above 0, got {value!r}")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mini-world", 986, 160, 432, 6, 5, 5, 32),
        Shape("tinyllama-1.1b", 32000, 2048, 5632, 22, 32, 4, 64),
        Shape("llama-3.2-1b", 128256, 2048, 8192, 16, 32, 8, 64, tied=True),
        Shape("llama-7b", 32000, 4096, 11008, 32, 32, 32, 128),
        Shape("llama3-8b", 128256, 4096, 14336, 32, 32, 8, 128),
        Shape("llama-13b", 32000, 5120, 13824, 40, 40, 40, 128),
    )
}


def find_shape(name: str) -> Shape:
    """A shape by its name in `SHAPES`, with or without `random:` before it, or that of a folder with a config.json.

    Raises ValueError for a name that is neither, or a file that is no Llama's.
    """
    known = SHAPES.get(name.removeprefix("random:"))
    if known is not None:
        return known
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(SHAPES)}, or a folder with a config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{file} is not JSON ({error}): copy the model's configuration anew") from error
    try:
        return Shape.of(config, file.parent.name)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
