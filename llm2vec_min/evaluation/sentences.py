"""How good the vectors are: rank correlation with human judgements of similarity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data import read_pairs
from ..encoder import LLM2Vec
from .metrics import spearman


def cosine_scores(l2v: LLM2Vec, first: list[str], second: list[str], batch_size: int = 32) -> np.ndarray:
    """Cosine of each pair's embeddings, (N,); every distinct sentence is encoded once."""
    texts = list(dict.fromkeys(first + second))
    row = {text: i for i, text in enumerate(texts)}
    vectors = l2v.encode(texts, batch_size=batch_size, normalize=True)
    return np.einsum("nc,nc->n", vectors[[row[t] for t in first]], vectors[[row[t] for t in second]])


def sts_score(l2v: LLM2Vec, path: str | Path, batch_size: int = 32) -> float:
    """Spearman x 100 between cosines and the scores of a pairs file (score <tab> sentence <tab> sentence)."""
    scores, first, second = read_pairs(path)
    return 100 * spearman(cosine_scores(l2v, first, second, batch_size), scores)
