"""Attention of the model: one function, so that a kernel can take its place."""

import torch.nn.functional as F
from torch import Tensor


def grouped_query_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention with grouped queries (arXiv 2305.13245).

    query:   [S, B, Hq, D];  key, value: [S, B, Hkv, D] with Hq a multiple of Hkv
    mask:    bool, broadcastable to [B, Hq, S, S], true where a query may look; None means causal
    returns: [S, B, Hq * D]
    """
    steps, batch, heads, width = query.shape
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=key.shape[2] != heads,
    )
    return out.permute(2, 0, 1, 3).reshape(steps, batch, heads * width)
