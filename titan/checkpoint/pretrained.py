"""The weights of a Hugging Face folder: which file holds what, whether they fit a model, what tells them from others.

No torch before a tensor is read.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from titan.config.model import ModelSettings
from titan.config.pretrained import CONFIG_FILE
from titan.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ONE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LOOK_BYTES, LOOKS = 1 << 16, 64
"""A fingerprint reads so many bytes at so many places of a file, spread evenly; training changes all of them."""
SPARE = ("lm_head.weight", ".rotary_emb.inv_freq")
"""Ends of names that a folder may have beyond what the model needs: a tied output weight, tables of old versions."""


class PretrainedWeights:
    """The tensors of a folder by name, found when opened and read when asked for."""

    def __init__(self, folder: Path):
        """Raises CheckpointError if files are missing or no safetensors."""
        self.folder = folder
        self.places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="np") as file:
                    for name in file.keys():  # noqa: SIM118  (a safetensors file is no dict)
                        self.places[name] = path
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is no safetensors file ({error}); copy the folder again") from None

    def mistakes(self, model: ModelSettings, vocab_size: int) -> list[str]:
        """Why these are not the weights of a model, one line a reason.

        vocab_size: pieces of the tokenizer; rows of the vocabulary beyond them are padding
        """
        found = []
        wanted = llama_shapes(model, vocab_size)
        for name, shape in wanted.items():
            has = self.shapes.get(name)
            rows_over = has is not None and name in vocabulary_names(model) and has[1:] == shape[1:] and has >= shape
            if has != shape and not rows_over:
                found.append(f"{name} is {'missing' if has is None else list(has)}, the model wants {list(shape)}")
        over = sorted(name for name in self.shapes.keys() - wanted.keys() if not name.endswith(SPARE))
        return found + [f"{name} has no place in a Llama model" for name in over]

    def read(self, name: str) -> "Tensor":
        """A whole tensor, float32. Raises CheckpointError if there is none of that name."""
        if name not in self.places:
            raise CheckpointError(f"{self.folder} has no {name}; copy the folder again")
        with safe_open(self.places[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.float()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises CheckpointError if there are none, or one is missing."""
    index = folder / INDEX_FILE
    names = {ONE_FILE}
    if index.is_file() and not (folder / ONE_FILE).is_file():
        try:
            names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{index} is damaged; copy the folder again") from None
    missing = [name for name in sorted(names) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {missing[0]}; weights must be safetensors, as `titan export` and save_pretrained write"
        )
    return [folder / name for name in sorted(names)]


def fingerprint(folder: Path) -> str:
    """Tells a folder's weights from others: a hash of config.json and of each file's size and evenly spread parts."""
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for number in range(LOOKS):
                file.seek(max(0, size - LOOK_BYTES) * number // (LOOKS - 1))
                digest.update(file.read(LOOK_BYTES))
                if size <= LOOK_BYTES:
                    break
    return digest.hexdigest()


def llama_shapes(model: ModelSettings, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of LlamaForCausalLM."""
    hidden, ffn = model.hidden, model.ffn
    narrow = model.num_kv_heads * (hidden // model.heads)
    shapes: dict[str, tuple[int, ...]] = {name: (vocab_size, hidden) for name in vocabulary_names(model)}
    shapes["model.norm.weight"] = (hidden,)
    of_layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return shapes | {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(model.layers)
        for name, shape in of_layer.items()
    }


def vocabulary_names(model: ModelSettings) -> tuple[str, ...]:
    """Tensors with a row a piece."""
    return ("model.embed_tokens.weight",) if model.tied else ("model.embed_tokens.weight", "lm_head.weight")
