"""From the states of a text's tokens to one vector. Always in float32: bfloat16 would round weights and vector to 2 or 3 digits."""

from __future__ import annotations

import torch
from torch import Tensor

POOLING_MODES = ("mean", "weighted_mean", "last", "first", "max")


def pool(hidden: Tensor, pool_mask: Tensor, mode: str = "mean") -> Tensor:
    """One vector per row, over its pooled tokens only.

    Args:
        hidden: (B, T, C), any float dtype.
        pool_mask: (B, T) bool, True = a token of the text itself: not padding, BOS, instruction or template.
        mode: mean; weighted_mean, where the p-th pooled token (from 1) weighs p / sum(1..n); last; first; max.
    Returns:
        (B, C) float32, not normalised. A row without a pooled token (an empty text) gives zeros.
    Raises:
        ValueError: an unknown mode.
    Source: LLM2Vec section 2.1 (EOS, mean, weighted mean); SGPT (arXiv 2202.08904) for the weights.
    """
    hidden = hidden.float()
    if mode == "max":
        peak = hidden.masked_fill(~pool_mask[:, :, None], -torch.inf).amax(dim=1)  # (B, C)
        return torch.where(pool_mask.any(dim=1, keepdim=True), peak, 0.0)

    order = pool_mask.cumsum(dim=1)  # 1, 2, ... n along the pooled tokens
    if mode == "mean":
        weights = pool_mask.float()
    elif mode == "weighted_mean":
        weights = (order * pool_mask).float()
    elif mode == "first":
        weights = (pool_mask & (order == 1)).float()
    elif mode == "last":
        weights = (pool_mask & (order == order[:, -1:])).float()
    else:
        raise ValueError(f"pooling is {mode!r}, expected one of {', '.join(POOLING_MODES)}")
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)  # (B, T); rows sum to 1, or to 0 if empty
    with torch.autocast(hidden.device.type, enabled=False):  # it would round
        return torch.einsum("bt,btc->bc", weights, hidden)
