"""A checkpoint in the names and shapes of Hugging Face's Llama, and back.

Shape letters: H query heads, G key-value heads, D width of a head.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan.checkpoint.load import Checkpoint
from titan.config.model import ModelSettings
from titan.model.parameters import INIT_STD, padded_vocab, parameter_specs


def llama_tensors(checkpoint: Checkpoint, model: ModelSettings, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of LlamaForCausalLM, float32, in forward order, one whole parameter at a time. They may be slices.

    Raises CheckpointError if the checkpoint is incomplete or of another model.
    """
    for name, spec in parameter_specs(model, vocab_size).items():
        yield from _renamed(name, checkpoint.whole("weight", name, spec), model, vocab_size)


def llama_parameter(name: str, read: Callable[[str], Tensor], model: ModelSettings, vocab_size: int) -> Tensor:
    """One whole parameter of ours from the tensors of LlamaForCausalLM: the inverse of `llama_tensors`.

    read: a tensor of theirs by name. Rows that they have beyond the vocabulary are left out, our padding is 0
    """
    match name:
        case "embedding.weight" | "head":
            rows = read("model.embed_tokens.weight" if name == "embedding.weight" else "lm_head.weight")[:vocab_size]
            return F.pad(rows, (0, 0, 0, padded_vocab(vocab_size) - vocab_size))
        case "final_norm.weight":
            return read("model.norm.weight")
    _, index, part = name.split(".", 2)
    return _layer_parameter(part, lambda theirs: read(f"model.layers.{index}.{theirs}.weight"), model)


def llama_config(
    model: ModelSettings, vocab_size: int, sequence_length: int, dtype: str, end_id: int, padding_id: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of config.json and generation_config.json. Names that changed in transformers 5 are there twice."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.hidden // model.heads,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},  # transformers 5
        "rope_theta": model.rope_theta,  # transformers 4
        "tie_word_embeddings": model.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": INIT_STD,
        "use_cache": True,
        "dtype": dtype,  # transformers 5
        "torch_dtype": dtype,  # transformers 4
        "bos_token_id": end_id,
        "eos_token_id": end_id,
    }
    return config, {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": padding_id}


def _renamed(name: str, whole: Tensor, model: ModelSettings, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """The Llama tensors that one of our parameters holds."""
    if name == "embedding.weight":
        yield "model.embed_tokens.weight", whole[:vocab_size]
    elif name == "head":
        yield "lm_head.weight", whole[:vocab_size]
    elif name == "final_norm.weight":
        yield "model.norm.weight", whole
    else:
        _, index, part = name.split(".", 2)
        for theirs, tensor in _layer_tensors(part, whole, model):
            yield f"model.layers.{index}.{theirs}.weight", tensor


def _layer_tensors(part: str, whole: Tensor, model: ModelSettings) -> Iterator[tuple[str, Tensor]]:
    match part:
        case "input_layernorm.weight":
            yield "input_layernorm", whole
        case "self_attention.linear_qkv.weight":
            groups, width = model.num_kv_heads, model.hidden // model.heads
            grouped = whole.view(groups, model.heads // groups + 2, width, model.hidden)
            yield "self_attn.q_proj", grouped[:, :-2].reshape(-1, model.hidden)  # [H * D, hidden]
            yield "self_attn.k_proj", grouped[:, -2].reshape(-1, model.hidden)  # [G * D, hidden]
            yield "self_attn.v_proj", grouped[:, -1].reshape(-1, model.hidden)
        case "self_attention.linear_proj.weight":
            yield "self_attn.o_proj", whole
        case "pre_mlp_layernorm.weight":
            yield "post_attention_layernorm", whole
        case "mlp.linear_fc1.weight":
            yield "mlp.gate_proj", whole[: model.ffn]
            yield "mlp.up_proj", whole[model.ffn :]
        case "mlp.linear_fc2.weight":
            yield "mlp.down_proj", whole
        case _:
            raise AssertionError(f"{part} has no place in a Llama model")


def _layer_parameter(part: str, read: Callable[[str], Tensor], model: ModelSettings) -> Tensor:
    """A parameter of a layer; read: a tensor of theirs by its name within the layer."""
    match part:
        case "input_layernorm.weight":
            return read("input_layernorm")
        case "self_attention.linear_qkv.weight":
            rows = (model.num_kv_heads, -1, model.hidden // model.heads, model.hidden)
            return torch.cat([read(f"self_attn.{one}_proj").view(rows) for one in "qkv"], dim=1).view(-1, model.hidden)
        case "self_attention.linear_proj.weight":
            return read("self_attn.o_proj")
        case "pre_mlp_layernorm.weight":
            return read("post_attention_layernorm")
        case "mlp.linear_fc1.weight":
            return torch.cat([read("mlp.gate_proj"), read("mlp.up_proj")])
        case "mlp.linear_fc2.weight":
            return read("mlp.down_proj")
        case _:
            raise AssertionError(f"{part} has no place in a Llama model")
