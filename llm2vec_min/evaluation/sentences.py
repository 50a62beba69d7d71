"""An encoder and a file to scores, at sentence level: similarity, pair classification, classification, clustering,
retrieval, reranking. The encoder is frozen; what is fitted on its vectors is a few lines of torch.

Files are UTF-8, plain or compressed (.gz, .xz):
    sts             F.tsv: score <tab> sentence <tab> sentence
    pairs           F.tsv: 1 or 0 (the same or not) <tab> sentence <tab> sentence
    classification  TRAIN.tsv,TEST.tsv: label <tab> text
    clustering      F.tsv: label <tab> text
    retrieval       a folder as BEIR's: corpus.jsonl {"_id", "title", "text"}, queries.jsonl {"_id", "text"} and
                    qrels.tsv: query id <tab> document id <tab> relevance, with or without a header. A document with a
                    query's _id is ranked like any other (mteb leaves it out in some sets, such as ArguAna)
    reranking       F.jsonl: {"query": text, "positive": [texts], "negative": [texts]}
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import OPENERS, numbered_lines, read_pairs
from ..encoder import LLM2Vec
from .metrics import average_precision, macro_f1, ndcg, recall, spearman, v_measure


class Score(NamedTuple):
    """A score that can be resampled: its value is `statistic(np.arange(N))`."""

    statistic: Callable[[np.ndarray], float]  # of the test rows with these numbers, repeats allowed; x 100
    groups: np.ndarray  # (N,) whole numbers: rows of one group are not independent of each other


def mean_score(values: np.ndarray) -> Score:
    """The mean x 100 of one value a row, rows independent."""
    return Score(lambda rows: 100 * float(np.mean(values[rows])), np.arange(len(values)))


def numbered(values: list[str]) -> np.ndarray:
    """(N,) whole numbers from 0, equal for equal texts, in the order of the sorted texts."""
    numbers = {value: number for number, value in enumerate(sorted(set(values)))}
    return np.array([numbers[value] for value in values])


# ---- Files ----


def sample(count: int, limit: int | None) -> np.ndarray:
    """Row numbers of at most `limit` of `count` rows, drawn at random (files are often sorted), in their order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])


def read_binary_pairs(path: str | Path) -> tuple[np.ndarray, list[str], list[str]]:
    """`read_pairs` where each score is 1 or 0; ValueError if not."""
    pairs = read_pairs(path)
    for number, line in numbered_lines(path):
        label = line.partition("\t")[0]
        if line and float(label) not in (0, 1):
            raise ValueError(f"{path}:{number}: found the label {label!r}, expected 1 or 0")
    return pairs


HEADERS = ("text", "texts", "sentence", "sentences", "title", "query", "question", "utterance", "content", "document")


def read_labelled(path: str | Path) -> dict[str, list]:
    """Lines of label <tab> text as lists: "labels", "texts", and the "lines" they stand on.

    Raises:
        ValueError: a line of another form (file and line number), or no line at all.
    """
    rows: dict[str, list] = {"labels": [], "texts": [], "lines": []}
    for number, line in numbered_lines(path):
        label, tab, text = line.partition("\t")
        if line and not tab:
            raise ValueError(f"{path}:{number}: found {line[:60]!r}, expected label<tab>text")
        if line:
            rows["labels"].append(label), rows["texts"].append(text), rows["lines"].append(number)
    if not rows["texts"]:
        raise ValueError(f"{path}: no text in it, expected lines of label<tab>text")
    label, text = rows["labels"][0], rows["texts"][0]
    if text.lower() in HEADERS and rows["labels"].count(label) == 1:
        raise ValueError(f"{path}:{rows['lines'][0]}: found the header {f'{label}<tab>{text}'!r}, expected label<tab>text only")
    return rows


def read_clustering(path: str | Path) -> dict[str, list]:
    """`read_labelled`; ValueError also where all labels are equal or all differ: k-means would be right for any encoder."""
    rows = read_labelled(path)
    if not 1 < (count := len(set(rows["labels"]))) < len(rows["texts"]):
        raise ValueError(
            f"{path}: {count} different labels on {len(rows['texts'])} lines, expected at least 2 labels, and fewer labels than lines"
        )
    return rows


def read_classification(paths: str) -> tuple[dict, dict]:
    """Train and test rows of "TRAIN.tsv,TEST.tsv"; ValueError also where a label occurs in one of them only, or all are
    equal: any encoder would be right."""
    names = two_files(paths)
    both = [read_labelled(name) for name in names]
    for here, there in ((1, 0), (0, 1)):
        known = sorted(set(both[there]["labels"]))
        for label, number in zip(both[here]["labels"], both[here]["lines"], strict=True):
            if label not in known:
                found = f"the label {label!r}, which does not occur in {names[there]}"
                raise ValueError(f"{names[here]}:{number}: found {found}, expected one of {', '.join(known[:8])}")
    if len(known) == 1:
        raise ValueError(f"{names[0]}: every label is {known[0]!r}, expected at least 2 different ones")
    return both[0], both[1]


def two_files(paths: str) -> list[str]:
    """The two names of TRAIN,TEST; ValueError for another number of them."""
    names = paths.split(",")
    if len(names) != 2 or not all(names):
        raise ValueError(f"{paths!r}: expected two files, TRAIN,TEST")
    return names


def read_jsonl(path: str | Path, **fields: type) -> Iterator[tuple[int, dict]]:
    """(line number, record) of each line; ValueError unless it is an object with these fields of these types."""
    shown = ", ".join(f'"{name}" ({kind.__name__})' for name, kind in fields.items())
    for number, line in numbered_lines(path):
        try:
            record = json.loads(line) if line else None
            json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair, as a cut string leaves it, is no text
            whole = record is None or all(isinstance(record[name], kind) for name, kind in fields.items())
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{path}:{number}: found {line[:60]!r}, expected a JSON object with {shown}")
        if line:
            yield number, record


def read_retrieval(folder: str | Path) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Documents by id (title and text joined), queries by id, and relevances: query id -> document id -> gain.

    Raises:
        ValueError: a file is missing or empty, a line is of another form, a judgement names no query or document.
    """

    def find(name: str) -> Path:
        for path in (Path(folder) / f"{name}{end}" for end in ("", *OPENERS)):
            if path.is_file():
                return path
        raise ValueError(f"{Path(folder) / name}: not found, expected it plain or with {' or '.join(OPENERS)}")

    texts: list[dict[str, str]] = []
    for path in (find("corpus.jsonl"), find("queries.jsonl")):
        texts.append({})
        for number, record in read_jsonl(path, _id=str, text=str):
            if record["_id"] in texts[-1]:
                raise ValueError(f"{path}:{number}: the _id {record['_id']!r} was there before, expected each once")
            if not isinstance(title := record.get("title") or "", str):
                raise ValueError(f"{path}:{number}: the title is {title!r:.60}, expected a text")
            texts[-1][record["_id"]] = f"{title} {record['text']}".strip()
        if not texts[-1]:
            raise ValueError(f"{path}: no text in it, expected JSON objects with _id and text")
    documents, queries = texts
    path, qrels = find("qrels.tsv"), {}
    for number, line in numbered_lines(path):
        fields = line.split("\t")
        if not line or (number == 1 and fields[-1] == "score"):  # BEIR's header
            continue
        if len(fields) != 3 or len(fields[2]) > 9 or not fields[2].removeprefix("-").isdecimal():
            raise ValueError(f"{path}:{number}: found {line[:60]!r}, expected query id<tab>document id<tab>whole number")
        for id, known, what in ((fields[0], queries, "queries"), (fields[1], documents, "corpus")):
            if id not in known:
                raise ValueError(f"{path}:{number}: {id!r} is no _id of {what}.jsonl, expected one that stands there")
        if qrels.setdefault(fields[0], {}).setdefault(fields[1], int(fields[2])) != int(fields[2]):
            raise ValueError(f"{path}:{number}: {fields[0]!r} and {fields[1]!r} were judged otherwise before")
    if not qrels:
        raise ValueError(f"{path}: no judgement in it, expected query id<tab>document id<tab>relevance")
    if not any(gain > 0 for judged in qrels.values() for gain in judged.values()):
        raise ValueError(f"{path}: no document is relevant to any query, expected a relevance above 0 somewhere")
    return documents, queries, qrels


def read_reranking(path: str | Path) -> list[tuple[str, list[str], list[str]]]:
    """(query, relevant texts, others) of each line; ValueError for another form, or where one of the lists is empty."""
    rows = []
    for number, record in read_jsonl(path, query=str, positive=list, negative=list):
        row = record["query"], record["positive"], record["negative"]
        if not all(texts and all(isinstance(text, str) for text in texts) for texts in row[1:]):
            raise ValueError(f"{path}:{number}: expected at least one text in positive and one in negative")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no query in it, expected JSON objects with query, positive and negative")
    return rows


# ---- Fitted on frozen vectors ----


def logistic_regression(
    train: np.ndarray, classes: np.ndarray, test: np.ndarray, device: str | torch.device = "cpu", C: float = 1.0
) -> np.ndarray:
    """Predicted classes of `test`, (M,), from a linear layer fitted to `train`.

    Every feature is scaled to mean 0 and variance 1 on the training rows, so that encoders whose vectors differ in length
    are penalised alike. Then scikit-learn's problem: cross-entropy summed + |W|^2 / (2 C), bias free, by L-BFGS. (For two classes
    scikit-learn fits one vector, the difference of our two, whose penalty is twice theirs: there this is its 2 C.)

    Args:
        train, test: (N, F) and (M, F) float32.
        classes: (N,) whole numbers from 0.
    """
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    std[std == 0] = 1

    def scaled(x: np.ndarray) -> Tensor:
        return torch.from_numpy(((x - mean) / std).astype(np.float32)).to(device)

    x, y = scaled(train), torch.from_numpy(classes).to(device)
    W = torch.zeros(int(classes.max()) + 1, train.shape[1], device=device, requires_grad=True)
    b = torch.zeros(len(W), device=device, requires_grad=True)
    stop = {"max_iter": 200, "tolerance_grad": 1e-5, "tolerance_change": 1e-9}
    optimizer = torch.optim.LBFGS([W, b], line_search_fn="strong_wolfe", **stop)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ W.T + b, y) + W.square().sum() / (2 * C * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (scaled(test) @ W.T + b).argmax(-1).cpu().numpy()


def kmeans(x: Tensor, k: int, generator: torch.Generator, centers: Tensor | None = None, most: int = 100) -> Tensor:
    """Cluster of each row of x (N, F), (N,) int64: Lloyd's steps from k-means++ until nothing moves, or `most` of them.

    Args:
        centers: (k, F) to start from instead. A cluster that loses all its rows keeps its centre.
    Source: Arthur and Vassilvitskii, k-means++, 2007.
    """
    if centers is None:
        chosen = [int(torch.randint(len(x), (1,), generator=generator))]
        nearest = (x - x[chosen[0]]).square().sum(-1)
        while len(chosen) < k:
            weights = nearest if nearest.sum() > 0 else torch.ones(len(x))  # fewer different rows than clusters
            chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
            nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(-1))
        centers = x[chosen]
    cluster = torch.full((len(x),), -1)
    for _ in range(most):
        before, cluster = cluster, torch.cdist(x, centers).argmin(-1)
        if torch.equal(before, cluster):
            break
        counts = torch.bincount(cluster, minlength=k)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, cluster, x)
        centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
    return cluster


# ---- Tasks: an encoder and what was read, to scores ----


def embed(l2v: LLM2Vec, texts: list[str], instruction: str | None) -> np.ndarray:
    """Vectors of length 1, (N, C), every distinct text encoded once; ValueError where one is not finite."""
    distinct = list(dict.fromkeys(texts))
    vectors = l2v.encode(distinct, instruction, normalize=True)
    if not np.isfinite(vectors).all():
        text = distinct[int(np.flatnonzero(~np.isfinite(vectors).all(-1))[0])]
        raise ValueError(f"the encoder's vector of {text[:60]!r} is not finite; try --dtype float32")
    row = {text: i for i, text in enumerate(distinct)}
    return vectors[[row[text] for text in texts]]


def embed_distinct(l2v: LLM2Vec, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the distinct texts, (M, C), and each text's row in them, (N,). Equal texts have equal scores only if these
    are computed once: in a product of a matrix two equal rows may differ in the last digit."""
    return embed(l2v, sorted(set(texts)), None), numbered(texts)


def cosine_scores(l2v: LLM2Vec, first: list[str], second: list[str], instruction: str | None = None) -> np.ndarray:
    """Cosine of each pair's embeddings, (N,); every distinct sentence is encoded once."""
    vectors = embed(l2v, first + second, instruction)
    return np.einsum("nc,nc->n", vectors[: len(first)], vectors[len(first) :])


def sts_score(l2v: LLM2Vec, path: str | Path) -> float:
    """Spearman x 100 between cosines and the scores of a pairs file (score <tab> sentence <tab> sentence)."""
    scores, first, second = read_pairs(path)
    return 100 * spearman(cosine_scores(l2v, first, second), scores)


def score_pairs(l2v: LLM2Vec, data, limit: int | None, instruction: str | None, metric: str) -> dict[str, Score]:
    """Spearman or average precision of the cosines. Pairs that share an anchor (the sentence of the two that occurs in
    more pairs) are one group."""
    rows = sample(len(data[0]), limit)
    gold, first, second = data[0][rows], [data[1][i] for i in rows], [data[2][i] for i in rows]
    cosines, times = cosine_scores(l2v, first, second, instruction), Counter(first + second)
    groups = numbered([a if times[a] >= times[b] else b for a, b in zip(first, second, strict=True)])
    formula = {"spearman": spearman, "average_precision": average_precision}[metric]

    def statistic(rows: np.ndarray) -> float:
        if len(np.unique(gold[rows])) == 1:  # a resample, or what --limit left: any encoder would be right, or wrong
            return math.nan
        return 100 * formula(gold[rows], cosines[rows])

    return {metric: Score(statistic, groups)}


def score_classification(l2v: LLM2Vec, data, limit: int | None, instruction: str | None) -> dict[str, Score]:
    """Accuracy and macro F1 of a logistic regression; both files are cut to `limit` rows."""
    vectors, labels = [], []
    for part in data:
        rows = sample(len(part["texts"]), limit)
        vectors.append(embed(l2v, [part["texts"][i] for i in rows], instruction))
        labels.append([part["labels"][i] for i in rows])
    train, gold = np.split(numbered(labels[0] + labels[1]), [len(labels[0])])
    predicted = logistic_regression(vectors[0], train, vectors[1], l2v.device)
    return {
        "accuracy": mean_score(gold == predicted),
        "macro_f1": Score(lambda rows: 100 * macro_f1(gold[rows], predicted[rows]), np.arange(len(gold))),
    }


def score_clustering(l2v: LLM2Vec, data, limit: int | None, instruction: str | None) -> dict[str, Score]:
    """V-measure of k-means with as many clusters as there are labels, the mean over ten seeds. Resamples draw rows and seeds:
    between two encoders the seeds can matter more than the rows."""
    rows = sample(len(data["texts"]), limit)
    gold = numbered([data["labels"][i] for i in rows])
    k = int(gold.max()) + 1
    if not 1 < k < len(gold):  # --limit left one label, or each once
        return {"v_measure": Score(lambda rows: float("nan"), np.arange(len(gold)))}
    x = torch.from_numpy(embed(l2v, [data["texts"][i] for i in rows], instruction))
    found = [kmeans(x, k, torch.Generator().manual_seed(seed)).numpy() for seed in range(10)]

    def statistic(rows: np.ndarray) -> float:
        runs = range(10)
        if not np.array_equal(rows, np.arange(len(gold))):  # a resample draws the seeds anew too, alike for every encoder
            runs = np.random.default_rng(rows).integers(0, 10, 10)
        return 100 * float(np.mean([v_measure(gold[rows], found[run][rows]) for run in runs]))

    return {"v_measure": Score(statistic, np.arange(len(gold)))}


def score_retrieval(l2v: LLM2Vec, data, limit: int | None, instruction: str | None) -> dict[str, Score]:
    """nDCG@10 and recall@100 by cosine over the whole corpus, for every judged query (`limit` of them). Documents get no
    instruction; equal scores (and equal texts) rank by document id, the last first, as in trec_eval."""
    documents, queries, qrels = data
    ids = sorted(documents, reverse=True)
    judged = [list(qrels)[i] for i in sample(len(qrels), limit)]
    vectors, rows = embed_distinct(l2v, [documents[id] for id in ids])
    values: dict[str, list[float]] = {"ndcg_at_10": [], "recall_at_100": []}
    for id, query in zip(judged, embed(l2v, [queries[id] for id in judged], instruction), strict=True):
        order = np.argsort(-(vectors @ query)[rows], kind="stable")[:100]
        gains, known = np.array([qrels[id].get(ids[i], 0) for i in order]), np.array(list(qrels[id].values()))
        values["ndcg_at_10"].append(ndcg(gains, known, 10))
        values["recall_at_100"].append(recall(gains, known, 100))
    return {metric: mean_score(np.array(v)) for metric, v in values.items()}


def score_reranking(l2v: LLM2Vec, data, limit: int | None, instruction: str | None) -> dict[str, Score]:
    """Mean average precision of each query's own candidates by cosine; candidates get no instruction."""
    data = [data[i] for i in sample(len(data), limit)]
    queries = embed(l2v, [query for query, _, _ in data], instruction)
    vectors, rows = embed_distinct(l2v, [text for _, a, b in data for text in a + b])
    values, start = [], 0
    for query, (_, a, b) in zip(queries, data, strict=True):
        stop = start + len(a) + len(b)
        mine, row = np.unique(rows[start:stop], return_inverse=True)
        values.append(average_precision(np.arange(stop - start) < len(a), (vectors[mine] @ query)[row]))
        start = stop
    return {"map": mean_score(np.array(values))}
