"""How every parameter may be cut over tensor ranks and how it starts, as one table over global names."""

import hashlib
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from titan.config.model import VOCAB_MULTIPLE, ModelSettings

INIT_STD = 0.02


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as the whole model sees it.

    `view` is a shape in which the cut is a plain slice of dimension `axis`; `axis` is None for a replicated parameter.
    `std` is the standard deviation of its initial normal values, None for ones.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    axis: int | None
    std: float | None

    def cut(self, whole: Tensor, tensor: int, tp: int) -> Tensor:
        """The part of tensor rank `tensor` of `tp`, in the local parameter's shape."""
        if self.axis is None or tp == 1:
            return whole.reshape(self.shape)
        part = whole.reshape(self.view).chunk(tp, dim=self.axis)[tensor]
        return part.reshape(self.local_shape(tp))

    def paste(self, whole: Tensor, part: Tensor, tensor: int, tp: int) -> None:
        """Write a local part into its place of the whole parameter; the inverse of `cut`."""
        if self.axis is None or tp == 1:
            whole.copy_(part.reshape(whole.shape))
            return
        target = whole.view(self.view).chunk(tp, dim=self.axis)[tensor]
        target.copy_(part.reshape(target.shape))

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of the part on one tensor rank."""
        if self.axis is None or tp == 1:
            return self.shape
        view = list(self.view)
        view[self.axis] //= tp
        return (math.prod(view[: len(view) - len(self.shape) + 1]), *view[len(view) - len(self.shape) + 1 :])


def parameter_specs(model: ModelSettings, vocab_size: int) -> dict[str, ParameterSpec]:
    """Every parameter of a model by global name, in forward order."""
    hidden, ffn, rows = model.hidden, model.ffn, padded_vocab(vocab_size)
    out_std = INIT_STD / math.sqrt(2 * model.layers)  # residual branches shrink with depth (GPT-2)

    def cut_rows(rows: int, columns: int, std: float) -> ParameterSpec:
        return ParameterSpec((rows, columns), (rows, columns), 0, std)

    def cut_columns(rows: int, columns: int, std: float) -> ParameterSpec:
        return ParameterSpec((rows, columns), (rows, columns), 1, std)

    norm = ParameterSpec((hidden,), (hidden,), None, None)
    specs = {"embedding.weight": cut_rows(rows, hidden, INIT_STD)}
    for index in range(model.layers):
        layer = f"layers.{index}"
        specs |= {
            f"{layer}.input_layernorm.weight": norm,
            f"{layer}.self_attention.linear_qkv.weight": query_key_value_spec(model, INIT_STD),
            f"{layer}.self_attention.linear_proj.weight": cut_columns(hidden, hidden, out_std),
            f"{layer}.pre_mlp_layernorm.weight": norm,
            # gate and up are stacked, and each is cut
            f"{layer}.mlp.linear_fc1.weight": ParameterSpec((2 * ffn, hidden), (2, ffn, hidden), 1, INIT_STD),
            f"{layer}.mlp.linear_fc2.weight": cut_columns(hidden, ffn, out_std),
        }
    specs["final_norm.weight"] = norm
    if not model.tied:
        specs["head"] = cut_rows(rows, hidden, INIT_STD)
    return specs


def query_key_value_spec(model: ModelSettings, std: float) -> ParameterSpec:
    """The projections of a layer: rows are grouped by key-value head: its query heads, its key, its value."""
    rows = (model.heads + 2 * model.num_kv_heads) * (model.hidden // model.heads)
    return ParameterSpec((rows, model.hidden), (rows, model.hidden), 0, std)


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding and of the output weight."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def initial_value(name: str, spec: ParameterSpec, seed: int) -> Tensor:
    """The whole parameter at step 0: a function of its name and the seed, so that no layout changes it."""
    if spec.std is None:
        return torch.ones(spec.shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(spec.shape).normal_(0.0, spec.std, generator=generator)


def num_parameters(model: ModelSettings, vocab_size: int) -> int:
    """Parameters of a model, without the padding of the vocabulary."""
    padding = padded_vocab(vocab_size) - vocab_size
    total = sum(math.prod(spec.shape) for spec in parameter_specs(model, vocab_size).values())
    return total - padding * model.hidden * (1 if model.tied else 2)


def layer_of(name: str) -> int | None:
    """Layer index in a global parameter name, if it has one."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None
