"""Rotary position embedding of queries and keys."""

import torch
from torch import Tensor

from titan.ops.choose import chosen


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn pairs of x by the angles of their position (arXiv 2104.09864), halves of D paired as in Llama.

    x: [S, B, H, D];  table: [2, S, D / 2] float32, cosines and sines
    """
    if chosen("rope", x) == "torch":
        return rope_twin(x, table)
    y: Tensor = torch.ops.titan.rope(x, table[0], table[1], False)
    return y


def rope_twin(x: Tensor, table: Tensor) -> Tensor:
    """See rope."""
    cos, sin = table[:, :, None, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
