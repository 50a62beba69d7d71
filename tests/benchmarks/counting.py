"""What a text's words alone are worth, without any model: the baseline of every task.

    python tests/benchmarks/counting.py --tasks sts:stsb_dev.tsv ...                    # into results/counting.json: "all rows",
    python tests/benchmarks/counting.py --limit 1500 --tasks retrieval:cranfield ...    # "1500 rows"

A text's vector has a number for each distinct word: log(texts / texts that have it), over the texts of the task (of a search:
over its documents), so that two texts are alike if they share rare words. KIND:PATH as in `python -m llm2vec_min.evaluation`.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

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

    def __init__(self, texts: list[str]):
        distinct = set(texts)
        counts = Counter(word for text in distinct for word in words(text))
        self.columns = {word: i for i, word in enumerate(sorted(counts))}
        self.weights = {word: np.log(len(distinct) / count) for word, count in counts.items()}

    def encode(self, texts: list[str], instruction: str | None = None, normalize: bool = True) -> np.ndarray:
        vectors = np.zeros((len(texts), len(self.columns)), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in words(text) & self.columns.keys():
                row[self.columns[word]] = self.weights[word]
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
    named = {}
    for file, column in (("counting", "1500 rows"), ("families-tiny", "models"), ("families-smollm2-135m", "models")):
        found = json.loads((RESULTS.parent / f"{file}.json").read_text())[column]
        rows = found if file == "counting" else found["+ simcse"]
        named[file] = {Path(task.split(":")[-1].split(",")[-1]).name.split(".")[0]: scores for task, scores in rows.items()}
    lines = ["| x 100 | metric | counts words | `tiny`, LLM2Vec | SmolLM2, LLM2Vec |", "|---|---|---|---|---|"]
    for name, scores in named["counting"].items():
        metric, score = next(iter(scores.items()))
        others = [named[file][name][metric]["value"] if name in named[file] else None for file in list(named)[1:]]
        cells = ["" if value is None else f"{value:.1f}" for value in others]
        interval = "{value:.1f} [{low:.1f}, {high:.1f}]".format(**score)
        lines.append(f"| {SETS[name]} | {METRICS[metric]} | {interval} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="KIND:PATH")
    parser.add_argument("--limit", type=int, help="rows to test on, and to train on, as the evaluation draws them")
    args = parser.parse_args()
    measured = {}
    for name, (kind, data) in compare.read_tasks(args.tasks).items():
        measured |= compare.measure(CountsWords(texts_of(kind, data)), {name: (kind, data)}, limit=args.limit)
        metric, score = next(iter(measured[name].items()))
        interval = compare.interval(*score)
        print(f"{name}: {metric} {interval['value']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]", flush=True)
    scores = {name: {metric: compare.interval(*score) for metric, score in m.items()} for name, m in measured.items()}
    before = read_json(RESULTS) if RESULTS.is_file() else {}
    write_json(RESULTS, before | {f"{args.limit or 'all'} rows": scores})
    if args.limit == 1500:  # the rows of the other results
        print(*table(), sep="\n")


if __name__ == "__main__":
    main()
