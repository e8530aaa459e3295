"""What a Hugging Face folder says of its model, as settings of a role. Only Llama, which is what titan's models are."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from titan.config.model import ModelSettings
from titan.config.settings import RunConfig
from titan.errors import ConfigError

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
NAMES = {
    "layers": ("num_hidden_layers", 32),
    "hidden": ("hidden_size", 4096),
    "heads": ("num_attention_heads", 32),
    "ffn": ("intermediate_size", 11008),
    "tied": ("tie_word_embeddings", False),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
"""Our names, theirs, and what transformers takes for a value that the file leaves out (LlamaConfig)."""
ALIKE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}
"""What has to be so, and is where it is left out."""


@dataclass(frozen=True)
class PretrainedModel:
    """The model of a folder."""

    model: ModelSettings
    vocab_size: int
    """Rows of its embedding: pieces of its tokenizer, and maybe padding."""
    positions: int
    """Longest sample that it was made for."""


def read_pretrained(folder: Path) -> PretrainedModel:
    """The model of a Hugging Face folder. Raises ConfigError, one line a reason, if titan has no such model."""
    path = folder / CONFIG_FILE
    try:
        said = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"teacher.source: cannot read {path}: {error.strerror}; give hf: and a folder of a causal language model, "
            "such as `titan export` writes"
        ) from None
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise ConfigError(f"teacher.source: {path} is no JSON object; give another folder")
    unlike = list(_unlike(said))
    if unlike:
        raise ConfigError(
            "\n".join(
                f"teacher.source: {path}: {each}; titan has only plain Llama, give another model" for each in unlike
            )
        )
    values = {ours: said.get(theirs, default) for ours, (theirs, default) in NAMES.items()}
    values |= {"kv_heads": said.get("num_key_value_heads"), "rope_theta": _rope(said).get("rope_theta", 10000.0)}
    try:
        model = ModelSettings.model_validate(values)
        return PretrainedModel(
            model, int(said.get("vocab_size", 32000)), int(said.get("max_position_embeddings", 2048))
        )
    except (ValidationError, TypeError, ValueError) as error:
        first = str(error.errors()[0]["loc"][0]) if isinstance(error, ValidationError) else "vocab_size"
        name = NAMES.get(first, (first, None))[0]
        raise ConfigError(f"teacher.source: {path}: {name} is nothing that a model can have; correct it") from None


def with_pretrained(config: RunConfig) -> RunConfig:
    """The config with the model, and the tokenizer, of the folder that is its teacher, where they are not given.

    Raises ConfigError if the folder has no such model.
    """
    teacher, data = config.teacher, config.data
    if teacher.pretrained is None or teacher.model is not None:
        return config
    folder = Path(teacher.pretrained)
    found = read_pretrained(folder)
    if data.tokenizer is None and (folder / TOKENIZER_FILE).is_file():
        data = data.model_copy(update={"tokenizer": str(folder / TOKENIZER_FILE)})
    return config.model_copy(update={"teacher": teacher.model_copy(update={"model": found.model}), "data": data})


def _unlike(said: dict[str, Any]) -> Iterator[str]:
    """What a config.json has that our model has not."""
    if said.get("model_type") != "llama":
        yield f"model_type is {said.get('model_type')!r}"
        return
    for name, wanted in ALIKE.items():
        if said.get(name, wanted) != wanted:
            yield f"{name} is {_short(said[name])}"
    rope = _rope(said)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        yield f"its rotary positions are {kind!r}"
    heads, hidden = said.get("num_attention_heads", 32), said.get("hidden_size", 4096)
    width = said.get("head_dim")
    if isinstance(heads, int) and heads and isinstance(hidden, int) and width not in (None, hidden // heads):
        yield f"head_dim is {width}, not hidden_size / num_attention_heads ({hidden // heads})"


def _rope(said: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions: transformers 5 has them in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    given = said.get("rope_parameters")
    if isinstance(given, dict):
        return given
    scaling = said.get("rope_scaling")
    theta = {"rope_theta": said["rope_theta"]} if "rope_theta" in said else {}
    return (scaling if isinstance(scaling, dict) else {}) | theta


def _short(value: object) -> str:
    return "given" if isinstance(value, dict | list) else repr(value)
