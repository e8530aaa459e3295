"""Norms of the model."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467, eq. 4) over the last dimension: x / sqrt(mean(x^2) + eps) * weight."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
