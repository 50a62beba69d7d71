"""An encoder at word level, the paper's probe: a linear layer on frozen token states says each word's tag.

Files are UTF-8, plain or compressed (.gz, .xz): CoNLL columns (the word first, the tag last, a blank line after each
sentence; chunking, NER) or CoNLL-U (.conllu: the universal part of speech).

A decoder keeps at position i - 1 what it predicts of token i, and MNTP trains it to. So a word is read in two ways: at
its own tokens, and one position to the left ("_left"), as the paper reads models trained with MNTP.
Source: LLM2Vec sections 3.1 and D.2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..data import numbered_lines
from ..encoder import LLM2Vec, sorted_batches
from ..tokenizer import Encoded
from .metrics import span_counts
from .sentences import Score, logistic_regression, sample, two_files

Sentence = tuple[list[str], list[str]]  # words, tags


def read_words(path: str | Path) -> list[Sentence]:
    """The sentences of a file of CoNLL columns, or of CoNLL-U where the name says so.

    Raises:
        ValueError: a line of another form (file and line number), or no sentence at all.
    """
    universal = ".conllu" in (suffix.lower() for suffix in Path(path).suffixes)
    sentences: list[Sentence] = [([], [])]
    for number, line in numbered_lines(path):
        fields = line.split("\t") if "\t" in line else [field for field in line.split(" ") if field]
        if not line or line.startswith("-DOCSTART-"):
            if sentences[-1][0]:
                sentences.append(([], []))
        elif universal and line.startswith("#"):
            continue
        elif not universal and "\t" in line and len(fields) == 10 and fields[0].isdecimal():
            raise ValueError(f"{path}:{number}: found ten columns, a number first: CoNLL-U, whose name must end in .conllu")
        elif len(fields) < (10 if universal else 2):
            shown = "the ten columns of CoNLL-U" if universal else "columns, the word first and its tag last"
            raise ValueError(f"{path}:{number}: found {line[:60]!r}, expected {shown}")
        elif not universal or fields[0].isdecimal():  # not a range of words that share a token, nor an empty node
            sentences[-1][0].append(fields[1] if universal else fields[0])
            sentences[-1][1].append(fields[3] if universal else fields[-1])
    sentences = [sentence for sentence in sentences if sentence[0]]
    if not sentences:
        raise ValueError(f"{path}: no sentence in it, expected columns, the word first and its tag last")
    return sentences


def read_probe(paths: str) -> tuple[list[Sentence], list[Sentence]]:
    """Train and test sentences of "TRAIN,TEST"; ValueError also where a tenth of the test's words have tags that
    never occur in the other (CoNLL-2000's own test has two such words)."""
    names = two_files(paths)
    train, test = (read_words(name) for name in names)
    seen, asked = ([tag for _, tags in part for tag in tags] for part in (train, test))
    known = set(seen)
    new = [tag for tag in asked if tag not in known]
    if 10 * len(new) >= len(asked):
        found, expected = (", ".join(sorted(set(tags))[:5]) for tags in (new, known))
        raise ValueError(
            f"{names[1]}: found the tags {found} on {len(new)} of {len(asked)} words, expected those of {names[0]}: {expected}"
        )
    return train, test


@torch.no_grad()
def word_states(l2v: LLM2Vec, sentences: list[list[str]], layers: list[int]) -> dict:
    """States of every word: the mean over its sub-words, in float32.

    Args:
        sentences: lists of words, which are joined by single spaces; no instruction, no chat template.
        layers: 0 = embeddings ... num_hidden_layers = the last, after the last norm.
    Returns:
        (layer, left) -> (number of all words, C). left: read one position before each sub-word (the first token of all
        stands for itself). A word cut off by max_length, or of which the tokenizer keeps nothing, gives zeros.
    """
    encoded, owners = [], []  # for each sentence its ids, and the (word, position) pairs that belong together
    texts, first = [" ".join(words) for words in sentences], 0
    for words, encoding in zip(sentences, l2v.tokenizer.encode_batch(texts), strict=True):
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        starts = np.append(0, ends[:-1] + 1)
        ids = np.array(encoding.ids[: l2v.max_length], dtype=np.int64)
        encoded.append(Encoded(ids, np.ones(len(ids), dtype=bool)))
        owners.append([])
        for position, (begin, end) in enumerate(encoding.offsets[: len(ids)]):
            if not encoding.special_tokens_mask[position]:  # a token over several words belongs to each
                owners[-1] += [(first + w, position) for w in np.flatnonzero((starts < end) & (ends > begin))]
        first += len(words)
    states = {(layer, left): torch.zeros(first, l2v.decoder.config.hidden_size) for layer in layers for left in (False, True)}
    counts = torch.zeros(first, 1)
    lengths = [len(row.ids) for row in encoded]
    for rows in sorted_batches(lengths, len(lengths), l2v.max_tokens // 8):  # the states of all layers are held at once
        batch = l2v.tokenizer.collate([encoded[i] for i in rows], l2v.device)
        hidden = l2v.decoder(batch.input_ids, batch.padding_mask, causal=l2v.causal, all_layers=True)
        pad = [batch.input_ids.shape[1] - lengths[i] for i in rows]
        pairs = [(b, word, pad[b] + p, pad[b] + max(p - 1, 0)) for b, i in enumerate(rows) for word, p in owners[i]]
        if not pairs:
            continue
        b, word, own, before = torch.tensor(pairs).T
        counts.index_add_(0, word, torch.ones(len(word), 1))
        for (layer, left), sums in states.items():
            sums.index_add_(0, word, hidden[layer][b, before if left else own].float().cpu())
    return {key: (sums / counts.clamp(min=1)).numpy() for key, sums in states.items()}


def score_words(
    l2v: LLM2Vec, data, limit: int | None, instruction: str | None, layers: list[int] | None = None
) -> dict[str, Score]:
    """Token accuracy, and F1 of whole chunks where the tags are of the form B-X, I-X, O; sentences are resampled.

    Args:
        layers: also the scores of these layers' states, as "..._layer_3".
    Returns:
        Of the last layer: token_accuracy, span_f1, and both as "..._left", read one position to the left.
    """
    L = l2v.decoder.config.num_hidden_layers
    train, test = ([part[i] for i in sample(len(part), limit)] for part in data)
    gold = [np.array(tags) for _, tags in test]
    names, classes = np.unique([tag for _, tags in train for tag in tags], return_inverse=True)
    chunked = all(tag == "O" or tag[1:2] == "-" for tag in names)
    wanted = dict.fromkeys([L, *(layers or [])])
    inputs, targets = (word_states(l2v, [words for words, _ in part], list(wanted)) for part in (train, test))
    scores: dict[str, Score] = {}
    stops = np.cumsum([len(tags) for tags in gold])[:-1]
    for layer, left in sorted(inputs, key=lambda key: (key[0] != L, key)):
        predicted = np.split(names[logistic_regression(inputs[layer, left], classes, targets[layer, left], l2v.device)], stops)
        counts = {"token_accuracy": [(np.sum(a == b), len(a)) for a, b in zip(gold, predicted, strict=True)]}
        if chunked:
            pairs = [span_counts(list(a), list(b)) for a, b in zip(gold, predicted, strict=True)]
            counts["span_f1"] = [(2 * right, both) for right, both in pairs]
        for metric, sums in counts.items():
            name = metric + ("_left" if left else "") + (f"_layer_{layer}" if layer != L else "")
            scores[name] = ratio_score(np.array(sums))
    return scores


def ratio_score(sums: np.ndarray) -> Score:
    """The first column's sum over the second's, x 100, of (N, 2) counts per sentence; 0 where nothing is counted."""
    return Score(lambda rows: 100 * float(sums[rows, 0].sum() / max(1, sums[rows, 1].sum())), np.arange(len(sums)))
