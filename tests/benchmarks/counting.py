"""What a text's words alone are worth, without any model: the baseline of every task.

    python tests/benchmarks/counting.py --tasks sts:stsb_dev.tsv ...                    # into results/counting.json: "all rows",
    python tests/benchmarks/counting.py --limit 1500 --tasks retrieval:cranfield ...    # "1500 rows"
    python tests/benchmarks/counting.py --limit 1500 --numbers 50 --tasks ...           # "1500 rows, 50 numbers"
    python tests/benchmarks/counting.py --random-vectors tiny --tasks ...               # "all rows, random vectors, tiny, draw 0", ...

A text is the set of its words. Its vector holds log(texts / texts that have it) for each, over the distinct texts of the whole
task (of a search: its documents), so that two texts are alike if they share rare words. With --numbers N only that many are
left of it, those of a singular value decomposition of all these vectors. With --random-vectors MODEL a text is the mean of its
tokens, each token of that model a vector of random numbers. KIND:PATH as in `python -m llm2vec_min.evaluation`.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from families import METRICS, SETS

from llm2vec_min import LLM2Vec
from llm2vec_min.evaluation import compare
from llm2vec_min.files import read_json, write_json
from llm2vec_min.model import init_weights

RESULTS = Path(__file__).parent / "results" / "counting.json"


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


class CountsWords:
    """What the tasks ask of an encoder."""

    device = "cpu"

    def __init__(self, texts: list[str], numbers: int | None = None):
        distinct = sorted(set(texts))
        counts = Counter(word for text in distinct for word in words(text))
        self.columns = {word: i for i, word in enumerate(sorted(counts))}
        self.weights = {word: np.log(len(distinct) / count) for word, count in counts.items()}
        self.turn = None
        if numbers:
            torch.manual_seed(0)
            self.turn = torch.svd_lowrank(torch.from_numpy(self.encode(distinct)), numbers, niter=4)[2].numpy()

    def encode(self, texts: list[str], instruction: str | None = None, normalize: bool = True) -> np.ndarray:
        vectors = np.zeros((len(texts), len(self.columns)), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in words(text) & self.columns.keys():
                row[self.columns[word]] = self.weights[word]
        vectors = vectors if self.turn is None else vectors @ self.turn
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def random_vectors(model: str, seed: int) -> LLM2Vec:
    """A decoder without a layer, with embeddings drawn anew: the mean of random vectors, of equal length, one for each token."""
    l2v = LLM2Vec.from_pretrained(model, device="cpu")
    torch.manual_seed(seed)
    init_weights(l2v.decoder)
    del l2v.decoder.layers[:]
    return l2v


def texts_of(kind: str, data) -> list[str]:
    """Every text of a task; of a search its documents."""
    if kind in ("sts", "pairs"):
        return data[1] + data[2]
    if kind == "retrieval":
        return list(data[0].values())
    if kind == "reranking":
        return [text for query, positive, negative in data for text in (query, *positive, *negative)]
    return [text for part in (data if kind == "classification" else [data]) for text in part["texts"]]


def table() -> list[str]:
    """Lines of a Markdown table: each set of the task families, beside LLM2Vec of both models (seed 0, other results here)."""
    read = lambda file: json.loads((RESULTS.parent / f"{file}.json").read_text())  # noqa: E731
    counted = read("counting")
    sides = [counted["1500 rows"], counted["1500 rows, 50 numbers"]]
    sides += [read(file)["models"]["+ simcse"] for file in ("families-tiny", "families-smollm2-135m")]
    whole, few, tiny, smollm2 = (
        {Path(task.split(":")[-1].split(",")[-1]).name.split(".")[0]: scores for task, scores in rows.items()} for rows in sides
    )
    lines = ["| x 100 | metric | counts words; as 50 numbers | `tiny`, LLM2Vec | SmolLM2, LLM2Vec |", "|---|---|---|---|---|"]
    for name, scores in whole.items():
        metric, score = next(iter(scores.items()))
        others = [side[name][metric]["value"] if name in side else None for side in (tiny, smollm2)]
        cells = ["" if value is None else f"{value:.1f}" for value in others]
        interval = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**score)
        if name in few:
            interval += "; {value:.1f} [{low:.1f}, {high:.1f}]".format(**few[name][metric])
        lines.append(f"| {SETS[name]} | {METRICS[metric]} | {interval} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="KIND:PATH")
    parser.add_argument("--limit", type=int, help="rows to test on, and to train on, as the evaluation draws them")
    parser.add_argument("--numbers", type=int, metavar="N", help="of a vector")
    parser.add_argument(
        "--random-vectors", metavar="MODEL", help="instead: whose tokens get a random vector each, in three draws"
    )
    args = parser.parse_args()
    if args.random_vectors and args.numbers:
        parser.error("--numbers is for counted words")
    for seed in range(3 if args.random_vectors else 1):
        label = f"{args.limit or 'all'} rows" + f", {args.numbers} numbers" * bool(args.numbers)
        label += f", random vectors, {Path(args.random_vectors).name}, draw {seed}" if args.random_vectors else ""
        random = random_vectors(args.random_vectors, seed) if args.random_vectors else None
        measured = {}
        for name, (kind, data) in compare.read_tasks(args.tasks).items():
            encoder = random or CountsWords(texts_of(kind, data), args.numbers)
            measured |= compare.measure(encoder, {name: (kind, data)}, limit=args.limit)
            metric, score = next(iter(measured[name].items()))
            interval = compare.interval(*score)
            print(f"{name}: {metric} {interval['value']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]", flush=True)
        scores = {name: {metric: compare.interval(*score) for metric, score in m.items()} for name, m in measured.items()}
        write_json(RESULTS, (read_json(RESULTS) if RESULTS.is_file() else {}) | {label: scores})
    if args.limit == 1500 and not args.random_vectors:  # the rows of the other results
        print(*table(), sep="\n")


if __name__ == "__main__":
    main()
