"""Are the evaluation's 95 % intervals and its 5 % test what they say? Simulated, since there the truth is known.

    python tests/benchmarks/intervals.py                                               # few rows, few positives, near 100 %
    python tests/benchmarks/intervals.py --clustering search_snippets.tsv.xz --sets 60  # two encoders that are equally good

"wrong": how often two equal encoders differ at p < 0.05, where 5 % is right. "covered": how often the interval holds the truth.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import sentences
from llm2vec_min.evaluation.compare import interval, paired, resample
from llm2vec_min.evaluation.metrics import average_precision, v_measure
from llm2vec_min.evaluation.sentences import Score, mean_score


def share(found: list[bool]) -> str:
    mean = np.mean(found)
    return f"{100 * mean:.1f} ± {100 * (mean * (1 - mean) / len(found)) ** 0.5:.1f} %"


def wrong(first: Score, second: Score) -> bool:
    return paired(resample(first), resample(second))["p"] < 0.05


def plain(count: int) -> None:
    rng = np.random.default_rng(0)

    def precision(labels: np.ndarray) -> Score:
        cosines = labels + rng.normal(size=len(labels))
        return Score(lambda rows: 100 * average_precision(labels[rows], cosines[rows]), np.arange(len(labels)))

    def differ_in(rows: int) -> tuple[Score, Score]:
        first = rng.integers(0, 2, 1500)
        second = first.copy()
        second[:rows] = 1 - first[:rows]
        return mean_score(first), mean_score(second)

    for n in (10, 30):
        found = [wrong(*(mean_score(rng.normal(size=n)) for _ in range(2))) for _ in range(count)]
        print(f"mean of {n} rows: wrong {share(found)}")
    labels = [rng.permutation(60) < 6 for _ in range(count)]
    print(f"average precision, 6 of 60 rows positive: wrong {share([wrong(precision(x), precision(x)) for x in labels])}")
    print(f"accuracy, 4 of 1,500 rows differ: wrong {share([wrong(*differ_in(4)) for _ in range(count)])}")
    truths = [interval(*resample(mean_score(rng.random(240) < 0.99))) for _ in range(count)]
    print(f"accuracy of 99 %, 240 rows: covered {share([x['low'] <= 99 <= x['high'] for x in truths])}")


class Stored:
    """An encoder of numbers written as texts: the vectors are given."""

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors

    def encode(self, texts: list[str], *_, **__) -> np.ndarray:
        return self.vectors[[int(text) for text in texts]]


def test_sets(path: str, sets: int, rows: int) -> Iterator[tuple[dict, list[np.ndarray]]]:
    """Rows drawn from a Gaussian per label, fitted to tiny-llm2vec's vectors, as two encoders with noise of their own see them."""
    data = sentences.read_clustering(path)
    gold = sentences.numbered(data["labels"])
    vectors = LLM2Vec.from_pretrained("tiny-llm2vec", device="cpu").encode(data["texts"], normalize=True)
    noise = 0.5 * np.median(np.linalg.norm(vectors - vectors.mean(0), axis=1)) / vectors.shape[1] ** 0.5
    groups = [vectors[gold == label] for label in range(gold.max() + 1)]
    for seed in range(sets):
        rng = np.random.default_rng(seed)
        labels = rng.choice(gold, rows)
        x = np.empty((rows, vectors.shape[1]))
        for label, group in enumerate(groups):
            here = labels == label
            x[here] = rng.multivariate_normal(group.mean(0), np.cov(group.T), here.sum())
        seen = [x + noise * rng.normal(size=x.shape) for _ in range(2)]
        seen = [(y / np.linalg.norm(y, axis=1, keepdims=True)).astype(np.float32) for y in seen]
        yield {"labels": [str(label) for label in labels], "texts": [str(i) for i in range(rows)]}, seen


def clustering(path: str, sets: int, rows: int) -> None:
    found = {"rows and seeds resampled": [], "rows alone": []}
    for number, (data, seen) in enumerate(test_sets(path, sets, rows), 1):
        gold = sentences.numbered(data["labels"])
        both, alone = [], []
        for vectors in seen:
            both.append(sentences.score_clustering(Stored(vectors), data, None, None)["v_measure"])
            x = torch.from_numpy(vectors)
            runs = [sentences.kmeans(x, gold.max() + 1, torch.Generator().manual_seed(s)).numpy() for s in range(10)]
            alone.append(
                Score(lambda r, runs=runs, gold=gold: 100 * np.mean([v_measure(gold[r], c[r]) for c in runs]), np.arange(rows))
            )
        for name, scores in zip(found, (both, alone), strict=True):
            found[name].append(wrong(*scores))
        print(f"{number} sets: " + ", ".join(f"{name}: wrong {share(some)}" for name, some in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clustering", metavar="F.tsv", help="label <tab> text, to fit the Gaussians to")
    parser.add_argument("--sets", type=int, default=500, help="simulated test sets")
    parser.add_argument("--rows", type=int, default=1500, help="of each, for --clustering")
    args = parser.parse_args()
    if args.clustering:
        clustering(args.clustering, args.sets, args.rows)
    else:
        plain(args.sets)


if __name__ == "__main__":
    main()
