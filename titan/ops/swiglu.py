"""SwiGLU, the gated activation of the model's feed-forward part."""

import torch
import torch.nn.functional as F
from torch import Tensor

from titan.ops.choose import chosen


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202); x: [..., gate and up, 2F]  ->  [..., F]."""
    if chosen("swiglu", x) == "torch":
        return swiglu_twin(x)
    y: Tensor = torch.ops.titan.swiglu(x)
    return y


def swiglu_twin(x: Tensor) -> Tensor:
    """See swiglu."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
