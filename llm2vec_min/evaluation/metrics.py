"""Formulas on arrays; nothing here knows of a model. Each equals its library's to the last digit that matters: scipy
(Spearman), scikit-learn (average precision, macro F1, V-measure), trec_eval (nDCG, recall), conlleval (spans)."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank; (N,) -> (N,) float64."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()  # rank of the last of each group of equal values
    return (last - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (N,) arrays, in [-1, 1]; nan when one of them is constant or N < 2."""
    if len(a) < 2:
        return float("nan")
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def average_precision(relevant: np.ndarray, scores: np.ndarray) -> float:
    """Mean precision at the rank of each relevant item, highest score first, equal scores at one rank.

    Args:
        relevant: (N,) bool.
        scores: (N,), any scale.
    Returns:
        In [0, 1]; 0 when nothing is relevant (as scikit-learn), nan when N = 0.
    """
    if not len(scores):
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits, scores = np.cumsum(np.asarray(relevant, dtype=bool)[order]), scores[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of each group of equal scores
    hits, seen = hits[last], np.flatnonzero(last) + 1
    return float(np.sum(np.diff(hits, prepend=0) * hits / seen) / max(1, hits[-1]))


def macro_f1(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over all classes that occur in either (N,) array of whole numbers >= 0 of the class's F1; nan when N = 0."""
    if not len(gold):
        return float("nan")
    size = max(gold.max(), predicted.max()) + 1
    right = np.bincount(gold[gold == predicted], minlength=size)
    total = np.bincount(gold, minlength=size) + np.bincount(predicted, minlength=size)
    return float(np.mean(2 * right[total > 0] / total[total > 0]))


def v_measure(gold: np.ndarray, clusters: np.ndarray) -> float:
    """Harmonic mean of homogeneity (a cluster holds one class) and completeness (a class lies in one cluster).

    Args:
        gold, clusters: (N,) whole numbers >= 0.
    Returns:
        In [0, 1]; 1 when N = 0. With equal weights of the two it is mutual information over mean entropy.
    Source: Rosenberg and Hirschberg, V-Measure, 2007.
    """
    if not len(gold):
        return 1.0
    K = clusters.max() + 1
    joint = np.bincount(gold * K + clusters, minlength=(gold.max() + 1) * K).reshape(-1, K) / len(gold)

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-np.sum(p * np.log(p)))

    separate, both = entropy(joint.sum(1)) + entropy(joint.sum(0)), entropy(joint.ravel())
    return max(0.0, 2 * (separate - both) / separate) if separate > 0 else 1.0


def ndcg(gains: np.ndarray, judged: np.ndarray, k: int = 10) -> float:
    """Discounted gain of the first k documents, over that of the best possible order.

    Args:
        gains: (N,) relevance of the documents as ranked, best first; 0 for those that nobody judged.
        judged: relevances of all judged documents of the query, found or not.
    Returns:
        In [0, 1]; 0 when nothing is relevant, as in trec_eval.
    """

    def discounted(gains: np.ndarray) -> float:
        gains = np.maximum(gains[:k], 0)
        return float(np.sum(gains / np.log2(np.arange(len(gains)) + 2)))

    ideal = discounted(np.sort(judged)[::-1])
    return discounted(gains) / ideal if ideal else 0.0


def recall(gains: np.ndarray, judged: np.ndarray, k: int = 100) -> float:
    """Share of the relevant documents that is among the first k; arguments as `ndcg`'s; 0 when nothing is relevant."""
    return float(np.sum(gains[:k] > 0) / max(1, int(np.sum(judged > 0))))


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first, one past the last) of each chunk of a sentence tagged B-X, I-X, O; also E-X, S-X (L-X, U-X).

    As conlleval reads them: an I-X that follows another type, or nothing, begins a chunk of its own.
    """
    found, start, kind, closed = set(), 0, "", True
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, now = tag.partition("-")
        if now != kind or prefix in ("B", "S", "U") or closed:
            if kind:
                found.add((kind, start, i))
            start, kind = i, now
        closed = prefix in ("E", "S", "L", "U")
    return found


def span_counts(gold: list[str], predicted: list[str]) -> tuple[int, int]:
    """Of one sentence: chunks that are right in type and both ends, and gold chunks plus predicted ones. Span F1 is
    2 x the sum of the first over the sum of the second."""
    a, b = spans(gold), spans(predicted)
    return len(a & b), len(a) + len(b)
