"""Every metric equals its library's on random and degenerate input."""

import random
import re

import numpy as np
import pytest
import pytrec_eval
import scipy.stats
import sklearn.metrics

from llm2vec_min.evaluation import metrics

RNG = np.random.default_rng(0)
CASES = [RNG.normal(size=40), RNG.integers(0, 4, 40).astype(float), RNG.integers(0, 2, 40).astype(float), np.arange(2.0)]


@pytest.mark.parametrize("a", CASES)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_spearman(a):
    for b in (RNG.normal(size=len(a)), RNG.integers(0, 3, len(a)) + np.arange(len(a)) // 2):
        assert metrics.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12, nan_ok=True)
    np.testing.assert_array_equal(metrics.ranks(a), scipy.stats.rankdata(a))


@pytest.mark.filterwarnings("error")
def test_spearman_undefined():
    for a, b in (([1.0, 1, 1], [1.0, 2, 3]), ([], []), ([1.0], [2.0])):
        assert np.isnan(metrics.spearman(np.array(a), np.array(b)))


@pytest.mark.parametrize("scores", CASES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.filterwarnings("ignore:No positive")
def test_average_precision(scores, share):
    relevant = RNG.random(len(scores)) < share
    expected = sklearn.metrics.average_precision_score(relevant, scores)
    assert metrics.average_precision(relevant, scores) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(metrics.average_precision(np.array([], dtype=bool), np.array([])))


@pytest.mark.parametrize(("k", "c"), [(5, 5), (1, 1), (1, 4), (4, 1), (2, 30)])
def test_macro_f1_and_v_measure(k, c):
    gold, found = RNG.integers(0, k, 60), RNG.integers(0, c, 60)
    for a, b in ((gold, found), (gold, gold), (2 * gold, 2 * found + 1)):
        f1 = sklearn.metrics.f1_score(a, b, average="macro", zero_division=0)
        assert metrics.macro_f1(a, b) == pytest.approx(f1, abs=1e-12)
        assert metrics.v_measure(a, b) == pytest.approx(sklearn.metrics.v_measure_score(a, b), abs=1e-9)
    assert metrics.v_measure(gold[:0], found[:0]) == sklearn.metrics.v_measure_score([], []) == 1
    assert np.isnan(metrics.macro_f1(gold[:0], found[:0]))


@pytest.mark.parametrize("documents", [3, 8, 150])
def test_ranking_equals_trec_eval(documents):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        qrel = {f"d{i}": int(g) for i, g in enumerate(rng.integers(-1, 4, documents)) if rng.random() < 0.4} or {"d0": 0}
        run = {f"d{i}": float(s) for i, s in enumerate(rng.permutation(documents)) if rng.random() < 0.8} or {"d1": 1.0}
        theirs = pytrec_eval.RelevanceEvaluator({"q": qrel}, {"ndcg_cut.10", "recall.100"}).evaluate({"q": run})["q"]
        gains = np.array([qrel.get(d, 0) for d in sorted(run, key=run.get, reverse=True)])
        judged = np.array(list(qrel.values()))
        assert metrics.ndcg(gains, judged) == pytest.approx(theirs["ndcg_cut_10"], abs=1e-9)
        assert metrics.recall(gains, judged) == pytest.approx(theirs["recall_100"], abs=1e-9)
    assert metrics.ndcg(gains[:0], judged) == 0 == metrics.recall(gains[:0], judged)


def by_pattern(tags: list[str]) -> set:
    """IOB2 without stray I-: chunks by a regular expression on one letter a tag."""
    found = set()
    for kind in {tag[2:] for tag in tags if tag != "O"}:
        letters = "".join(tag[0] if tag[2:] == kind else "-" for tag in tags)
        found |= {(kind, *m.span()) for m in re.finditer("BI*", letters)}
    return found


def test_spans():
    draw = random.Random(0)
    for _ in range(300):
        tags: list[str] = []
        for _ in range(draw.randrange(12)):
            kind = draw.choice("XY")
            tags.append(draw.choice(["O", f"B-{kind}", *([f"I-{tags[-1][2:]}"] if tags and tags[-1] != "O" else [])]))
        assert metrics.spans(tags) == by_pattern(tags)
    assert metrics.spans(["I-X", "I-X", "I-Y", "O", "I-Y"]) == {("X", 0, 2), ("Y", 2, 3), ("Y", 4, 5)}
    assert metrics.spans(["S-X", "S-X", "B-X", "E-X", "I-X"]) == {("X", 0, 1), ("X", 1, 2), ("X", 2, 4), ("X", 4, 5)}
    assert metrics.spans([]) == metrics.spans(["O", "O"]) == set()
    gold, found = ["B-X", "I-X", "O", "B-Y"], ["B-X", "O", "O", "B-Y"]
    assert metrics.span_counts(gold, found) == (1, 4)  # precision 1/2, recall 1/2
