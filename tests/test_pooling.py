"""Pooling by hand, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2vec_min.pooling import POOLING_MODES, pool


@settings(deadline=None, derandomize=True)
@given(rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_by_hand(mode, rows, seed):
    hidden = np.random.default_rng(seed).normal(size=(len(rows), 6, 3)).astype(np.float32)
    pooled = pool(torch.from_numpy(hidden), torch.tensor(rows), mode).numpy()
    for states, mask, vector in zip(hidden.astype(np.float64), rows, pooled, strict=True):
        own = states[mask]
        if not len(own):
            assert not vector.any()
            continue
        p = np.arange(1, len(own) + 1)
        expected = {
            "mean": own.mean(0), "weighted_mean": (p[:, None] * own).sum(0) / p.sum(), "last": own[-1], "first": own[0], "max": own.max(0),
        }[mode]  # fmt: skip
        np.testing.assert_allclose(vector, expected, atol=1e-6)


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
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), "eos")
