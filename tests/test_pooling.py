"""Pooling by hand, in float64."""

import numpy as np
import pytest
import torch

from llm2vec_min.pooling import POOLING_MODES, pool

MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0]]).bool()


def by_hand(rows: np.ndarray, mode: str) -> np.ndarray:
    n = len(rows)
    if mode == "weighted_mean":
        return sum((p + 1) / (n * (n + 1) / 2) * rows[p] for p in range(n))
    return {"mean": rows.mean(0), "last": rows[-1], "first": rows[0], "max": rows.max(0)}[mode]


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_by_hand(mode):
    hidden = torch.randn(3, 6, 4) - 2
    result = pool(hidden, MASK, mode)
    for b in range(3):
        expected = by_hand(hidden[b][MASK[b]].double().numpy(), mode)
        np.testing.assert_allclose(result[b].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_empty_row_gives_zeros_and_bfloat16_is_pooled_in_float32(mode):
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[False] * 3, [True] * 3])
    assert torch.equal(pool(hidden, mask, mode)[0], torch.zeros(4))
    half = hidden.bfloat16()
    result = pool(half, mask, mode)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, pool(half.float(), mask, mode))


def test_unknown_mode():
    with pytest.raises(ValueError, match="pooling is 'eos', expected one of mean, weighted_mean"):
        pool(torch.zeros(1, 1, 1), MASK[:1, :1], "eos")
