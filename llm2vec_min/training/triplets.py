"""Triplets for supervised training: files to data sets, data sets to the batches of a run."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data import batches, numbered_lines
from .settings import Settings


class Triplet(NamedTuple):
    query: str
    positive: str
    negatives: tuple[str, ...] = ()  # hard ones, of this query
    instruction: str = ""  # before the query
    symmetric: bool = False  # before the others too


class DataSet(NamedTuple):
    name: str
    triplets: list[Triplet]
    ratio: float = 1.0  # how often it is drawn, by its size


# The E5 mixture in the files that the authors of LLM2Vec train on. "=" marks the symmetric ones.
ECHO_DATA = {
    "allnli_split1": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "allnli_split2": "=Retrieve semantically similar text",
    "dureader": "Given a Chinese search query, retrieve web passages that answer the question",
    "eli5_question_answer": "Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",
    "fever": "Given a claim, retrieve documents that support or refute the claim",
    "hotpot_qa": "Given a multi-hop question, retrieve documents that can help answer the question",
    "miracl": "Given a question, retrieve Wikipedia passages that answer the question",
    "mrtydi": "Given a question, retrieve Wikipedia passages that answer the question",
    "msmarco_passage": "Given a web search query, retrieve relevant passages that answer the query",
    "msmarco_document": "Given a web search query, retrieve relevant documents that answer the query",
    "nq": "Given a question, retrieve Wikipedia passages that answer the question",
    "quora_duplicates_split1": "=Given a question, retrieve questions that are semantically equivalent to the given question",
    "quora_duplicates_split2": "=Find questions that have the same meaning as the input question",
    "squad": "Retrieve Wikipedia passages that answer the question",
    "t2ranking": "Given a Chinese search query, retrieve web passages that answer the question",
    "trivia_qa": "Retrieve Wikipedia passages that answer the question",
}


FIELDS = ("query", "positive", "negative", "instruction")


def texts_of(record: dict, field: str, where: str) -> list[str]:
    """A field's text or texts; ValueError if it is something else, or missing (only the negative may be)."""
    value = record.get(field)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) and text.strip() for text in values) or (field != "negative" and not values):
        many = " or a list of texts" if field in ("positive", "negative") else ""
        what = f"is {value!r:.60}, expected a text{many}" if field in record else "is missing"
        raise ValueError(f'{where}: "{field}" {what}; a line is {{"query": ..., "positive": ..., "negative": ...}}')
    if not "".join(values).isprintable() and any("\ud800" <= letter <= "\udfff" for text in values for letter in text):
        raise ValueError(f'{where}: "{field}" holds half of a surrogate pair')
    return [text.strip() for text in values]


def read_file(path: Path) -> list[Triplet]:
    """A file's triplets, one for each positive."""
    in_echo_data = path.parent.name == "echo-data"
    usual = ECHO_DATA.get(path.name.split(".")[0], "") if in_echo_data else ""
    triplets = []
    for number, line in numbered_lines(path, report=True):
        if not line:
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: holds a {type(record).__name__}, expected a JSON object")
        for field in record:
            meant = field.lower().removesuffix("s")
            if field not in FIELDS and meant in FIELDS and meant not in record:
                raise ValueError(f'{where}: has the field "{field}", which is not read; expected "{meant}"')
            if field not in FIELDS and any(kind in meant and kind not in record for kind in ("positive", "negative")):
                raise ValueError(f'{where}: has the field "{field}", which is not read; several texts are a list in "negative"')
        (query, *rest), positives, negatives = (texts_of(record, field, where) for field in ("query", "positive", "negative"))
        own = record.get("instruction")
        if rest or not isinstance(own, str | None):
            raise ValueError(f'{where}: "query" and "instruction" are one text each')
        own = "".join(texts_of(record, "instruction", where)) if own and own.strip() else ""
        instruction = own or (usual and usual.removeprefix("=") + ";")
        triplets += [Triplet(query, positive, tuple(negatives), instruction, usual.startswith("=")) for positive in positives]
    if not triplets:
        raise ValueError(f"{path}: no triplet in it")
    return triplets


def read_triplets(
    paths: list[str | Path], symmetric: list[str] | None = None, ratios: list[str] = ()
) -> tuple[list[DataSet], int]:
    """Files of one JSON object a line: "query", "positive" (a list: one triplet for each), "negative" (may be missing, or a
    list) and "instruction" (may be missing). Each file is a data set by its name; in a folder called echo-data, the
    authors', instructions are known and `_split1` and `_split2` are one.

    Args:
        symmetric: names of data sets whose positives and negatives get the instruction too; empty: all of them.
        ratios: "name=2": that one is drawn twice as often as its size says.
    Returns:
        Data sets, and the number of negatives that were left out because they equal a positive of their
        query (under its instruction) in any line.
    Raises:
        ValueError: file, line and what is wrong there; a name that is none.
    """
    paths = [Path(os.path.abspath(path)) for path in paths]  # a bare name has a folder, too
    stems = {path: path.name.split(".")[0] for path in paths}
    sets, origins, equal = {}, defaultdict(dict), 0
    for path in paths:
        name = stems[path]
        if path.parent.name == "echo-data":
            name = name.removesuffix("_split1").removesuffix("_split2")
        elif list(stems.values()).count(name) > 1:
            same = {other for other in paths if (other.parent, stems[other]) == (path.parent, name)}
            name = f"{path.parent.name}/{name if len(same) == 1 else path.name}"
        known = origins[name]  # stem -> file; of the authors' halves one each
        first = known.get(stems[path]) if path.parent.name == "echo-data" else next(iter(known.values()), None)
        known[stems[path]] = path
        if first not in (None, path):
            raise ValueError(f"{first} and {path} would both be the data set {name}; rename one, or its folder")
        sets.setdefault(name, []).extend(read_file(path))
    for triplets in sets.values():
        right = {(t.query, t.instruction, t.positive) for t in triplets}
        for i, t in enumerate(triplets):
            wrong = tuple(text for text in t.negatives if (t.query, t.instruction, text) not in right)
            if dropped := len(t.negatives) - len(wrong):
                triplets[i] = t._replace(negatives=wrong)
                equal += dropped
    factors, said = dict.fromkeys(sets, 1.0), set()
    for text in ratios:
        name, _, value = text.rpartition("=")
        try:
            factors[name] = float(value)
        except ValueError:
            name = None
        if name not in sets or not 0 < factors[name] < np.inf:
            raise ValueError(f"--ratio {text}: expected NAME=NUMBER, above 0; the data sets are {', '.join(sets)}")
        if name in said:
            raise ValueError(f"--ratio {text}: {name} has a ratio already")
        said.add(name)
    if unknown := set(symmetric or ()) - set(sets):
        raise ValueError(f"--symmetric {' '.join(unknown)}: not a data set; they are {', '.join(sets)}")
    if symmetric is not None and not any(t.instruction for name in symmetric or sets for t in sets[name]):
        raise ValueError("--symmetric: none of these data sets has an instruction to put before the others too")
    for name in sets if symmetric == [] else symmetric or ():
        sets[name] = [triplet._replace(symmetric=True) for triplet in sets[name]]
    return [DataSet(name, triplets, factors[name]) for name, triplets in sets.items()], equal


def check_negatives(name: str, triplets: list[Triplet], settings: Settings) -> None:
    """ValueError for a data set in which no query has a wrong answer: its loss is 0, and nothing is learned."""
    if not settings.in_batch_negatives and not any(set(t.negatives) - {t.query} for t in triplets):
        raise ValueError(f"data set {name} has no hard negatives (that differ from their query), and --no-in-batch-negatives "
                         "leaves nothing else to learn from")  # fmt: skip
    right, every = defaultdict(set), set()
    for t in triplets:
        right[t.query, t.instruction] |= {t.query, t.positive}
        every.update((t.positive, *t.negatives))
    if all(every <= known for known in right.values()):
        raise ValueError(f"data set {name}: no text in it is a wrong answer to one of its queries, nothing to tell apart")


def draw(sets: list[DataSet], settings: Settings) -> list[np.ndarray]:
    """The batch of each step, (B,) numbers of triplets counted through all data sets. One batch, one data set; which, is
    drawn in proportion to size and ratio, and within it each triplet comes at most once an epoch.

    Raises:
        ValueError: a data set that is smaller than a batch, or has nothing to tell apart.
    """
    for name, triplets, _ in sets:
        if wrong := next((t for t in triplets if isinstance(t.negatives, str)), None):
            raise ValueError(f"data set {name}: negatives is {wrong.negatives!r:.60}, expected a tuple of texts")
        if len(triplets) < settings.batch_size:
            raise ValueError(f"data set {name} has {len(triplets)} triplets, fewer than --batch-size {settings.batch_size}: "
                             "lower that, or join small data sets in one file")  # fmt: skip
        check_negatives(name, triplets, settings)
    weights = np.array([len(triplets) * ratio for _, triplets, ratio in sets])
    chosen = np.random.default_rng(settings.seed).choice(len(sets), settings.steps, p=weights / weights.sum())
    orders = [batches(len(triplets), settings.batch_size, settings.seed) for _, triplets, _ in sets]
    first = np.cumsum([0] + [len(triplets) for _, triplets, _ in sets])
    return [first[i] + next(orders[i]) for i in chosen]
