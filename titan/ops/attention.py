"""Attention of the model, with grouped queries: who sees whom is causal, by segments, or both."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titan.ops.choose import chosen

KERNEL_WIDTHS = range(4, 257, 4)
"""Widths of a head that the CUDA kernel takes."""


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees.

    Keys may be more than queries: those before are a memory (arXiv 1901.02860) that every query sees, so query i is at
    position i + (keys - queries). A query that sees nothing gets zeros.
    """

    causal: bool = True
    """No key after the query's own position."""
    query_segments: Tensor | None = None
    """int32 [B, Sq]: a query sees keys of its own segment only; None for all."""
    key_segments: Tensor | None = None
    """int32 [B, Sk]."""

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """True where a query sees a key: bool [B or 1, 1, queries, keys]."""
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        if self.causal:
            seen = seen.tril(keys - queries)
        if self.query_segments is not None and self.key_segments is not None:
            seen = seen & (self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :])
        return seen


def attention(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
    """Softmax attention with grouped queries (arXiv 2305.13245).

    query:   [Sq, B, Hq, D];  key, value: [Sk, B, Hkv, D] with Hq a multiple of Hkv
    returns: [Sq, B, Hq * D]
    """
    queries, batch, heads, width = query.shape
    if chosen("attention", query) == "cuda" and width in KERNEL_WIDTHS:
        out: Tensor = torch.ops.titan.attention(
            query, key, value, visibility.query_segments, visibility.key_segments, visibility.causal, width**-0.5
        )[0]
    else:
        out = _scaled_dot_product(query, key, value, visibility)
    return out.reshape(queries, batch, heads * width)


def _scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
    """The attention of torch; masks are made only where its flags do not say it all."""
    plain = visibility.query_segments is None and (not visibility.causal or len(query) == len(key))
    seen = None if plain else visibility.mask(len(query), len(key), query.device)
    nothing = None if seen is None else ~seen.any(dim=3, keepdim=True)
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=None if seen is None or nothing is None else seen | nothing,  # a row of -inf would be NaN
        is_causal=plain and visibility.causal,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    if nothing is not None:
        out = out.masked_fill(nothing, 0.0)
    return out.permute(2, 0, 1, 3)


def attention_twin(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """As it is written: softmax(q k / sqrt(D)) v over the keys that are seen.

    returns: [Sq, B, Hq, D], and the log-sum-exp of the scores [B, Hq, Sq]; 0 and -inf where nothing is seen
    """
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / math.sqrt(query.shape[3])
    seen = visibility.mask(len(query), len(key), query.device)
    blind = ~seen.any(dim=3, keepdim=True)
    scores = scores.masked_fill(~(seen | blind), -torch.inf)
    out = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(dim=3).masked_fill(blind, 0.0), value)
    return out, scores.logsumexp(dim=3).masked_fill(blind[..., 0], -torch.inf)
