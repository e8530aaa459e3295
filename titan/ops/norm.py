"""Norms of the model, alone or with the sum before them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from titan.ops import apex
from titan.ops.choose import chosen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467, eq. 4) over the last dimension: x / sqrt(mean(x^2) + eps) * weight."""
    backend = chosen("rms_norm", x)
    if backend == "apex":
        return apex.norm("rms_norm", x, weight, eps)
    if backend == "torch":
        return rms_norm_twin(x, weight, eps)
    y: Tensor = torch.ops.titan.rms_norm(x, None, weight, eps)[0]
    return y


def residual_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and that sum."""
    if chosen("rms_norm", x) in ("apex", "torch"):
        hidden = x + residual
        return rms_norm(hidden, weight, eps), hidden
    y, hidden, _ = torch.ops.titan.rms_norm(x, residual, weight, eps)
    return y, hidden


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm (arXiv 1607.06450) over the last dimension: (x - mean) / sqrt(variance + eps) * weight + bias."""
    backend = chosen("layer_norm", x)
    if backend == "apex":
        return apex.norm("layer_norm", x, weight, bias, eps)
    if backend == "torch":
        return layer_norm_twin(x, weight, bias, eps)
    y: Tensor = torch.ops.titan.layer_norm(x, None, weight, bias, eps)[0]
    return y


def residual_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual, and that sum."""
    if chosen("layer_norm", x) in ("apex", "torch"):
        hidden = x + residual
        return layer_norm(hidden, weight, bias, eps), hidden
    y, hidden, _, _ = torch.ops.titan.layer_norm(x, residual, weight, bias, eps)
    return y, hidden


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See rms_norm."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def layer_norm_twin(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See layer_norm."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
