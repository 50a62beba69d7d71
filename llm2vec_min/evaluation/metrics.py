"""Formulas on arrays; nothing here knows of a model."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank; (N,) -> (N,) float64."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()  # rank of the last of each group of equal values
    return (last - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (N,) arrays, in [-1, 1]; nan when one of them is constant."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
