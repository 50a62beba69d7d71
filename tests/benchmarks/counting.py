"""What a text's words alone are worth, without any model: the baseline of every task.

    python tests/benchmarks/counting.py --tasks sts:stsb_dev.tsv ...                    # into results/counting.json: "all rows",
    python tests/benchmarks/counting.py --limit 1500 --tasks retrieval:cranfield ...    # "1500 rows"
    python tests/benchmarks/counting.py --limit 1500 --numbers 50 --tasks ...           # "1500 rows, 50 numbers"

A text is the set of its words. Its vector holds log(texts / texts that have it) for each, over the distinct texts of the whole
task (of a search: its documents), so that two texts are alike if they share rare words. With --numbers N only that many are
left of it, those of a singular value decomposition of all these vectors. KIND:PATH as in `python -m llm2vec_min.evaluation`.
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

from llm2vec_min.evaluation import compare
from llm2vec_min.files import read_json, write_json

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
    args = parser.parse_args()
    measured = {}
    for name, (kind, data) in compare.read_tasks(args.tasks).items():
        measured |= compare.measure(CountsWords(texts_of(kind, data), args.numbers), {name: (kind, data)}, limit=args.limit)
        metric, score = next(iter(measured[name].items()))
        interval = compare.interval(*score)
        print(f"{name}: {metric} {interval['value']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]", flush=True)
    scores = {name: {metric: compare.interval(*score) for metric, score in m.items()} for name, m in measured.items()}
    before = read_json(RESULTS) if RESULTS.is_file() else {}
    write_json(RESULTS, before | {f"{args.limit or 'all'} rows" + f", {args.numbers} numbers" * bool(args.numbers): scores})
    if args.limit == 1500:  # the rows of the other results
        print(*table(), sep="\n")


if __name__ == "__main__":
    main()
