"""Stage 3, supervised contrastive training (LLM2Vec section 5). Read simcse.py first: the loss itself, `info_nce`, and GradCache,
`backward`, are there; files and the drawing of batches are in triplets.py.

Each query has a positive, which answers it or says the same, and perhaps hard negatives, which only look like it. The loss
is SimCSE's, with the positive where the twin was: to find it among the positives and hard negatives of the whole batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..device import rank, to_device, world_size
from ..encoder import LLM2Vec
from ..pooling import pool
from ..tokenizer import Encoded
from . import distributed
from .loop import Loop
from .settings import Settings
from .simcse import backward, info_nce
from .triplets import DataSet, Triplet, check_negatives, draw


def flatten(triplets: list[Triplet]) -> list[tuple[str, str]]:
    """(instruction, text) of B queries, then the candidates: B positives, and all hard negatives, row by row."""
    documents = [(t, t.positive) for t in triplets] + [(t, text) for t in triplets for text in t.negatives]
    queries = [(t.instruction, t.query) for t in triplets]
    return queries + [(t.instruction if t.symmetric else "", text) for t, text in documents]


def owners(triplets: list[Triplet]) -> np.ndarray:
    """(N,): the row that each candidate came with."""
    return np.concatenate([np.arange(len(triplets)), np.repeat(np.arange(len(triplets)), [len(t.negatives) for t in triplets])])


def candidate_mask(triplets: list[Triplet], in_batch: bool = True, texts: list | None = None) -> Tensor:
    """Which candidates each query is compared with, (B, N) bool: its positive, and those that are wrong answers to it.

    A candidate equal to the query, or to any positive of the same query and instruction in the batch, is not wrong.

    Args:
        in_batch: whether other rows' positives and negatives are compared with, or only the query's own.
        texts: compared instead of the texts, such as their ids after the cut, in the order of `flatten`.
    """
    right, where = defaultdict(set), defaultdict(list)  # texts that are not wrong; columns where a text stands
    texts = [text for _, text in flatten(triplets)] if texts is None else texts
    queries, candidates = texts[: len(triplets)], texts[len(triplets) :]
    for t, query, positive in zip(triplets, queries, candidates, strict=False):  # the positives come first
        right[query, t.instruction] |= {query, positive}
    for column, text in enumerate(candidates):
        where[text].append(column)
    owner = torch.from_numpy(owners(triplets))
    row = torch.arange(len(triplets))
    compared = (owner == row[:, None]) | in_batch
    for i, t in enumerate(triplets):
        compared[i, [column for text in right[queries[i], t.instruction] for column in where.get(text, ())]] = False
    compared[row, row] = True
    return compared


def compared_in(batch: list[Triplet], encoded: list[Encoded], settings: Settings) -> Tensor:
    """`candidate_mask` by the texts and by what the model reads of them: long ones may differ only behind the cut."""
    seen = [row.ids[row.pooled].tobytes() for row in encoded]
    return candidate_mask(batch, settings.in_batch_negatives) & candidate_mask(batch, settings.in_batch_negatives, seen)


def supervised_loss(vectors: Tensor, compared: Tensor, temperature: float = 0.02, matryoshka: tuple[int, ...] = ()) -> Tensor:
    """InfoNCE of B queries among N candidates: the mean over whole vectors and over their first `matryoshka` numbers
    (arXiv 2205.13147), which thus become usable on their own.

    Args:
        vectors: (B + N, C) float32, as `flatten` orders the texts.
        compared: (B, N) bool, from `candidate_mask`.
    """
    queries, candidates = vectors.split(compared.shape)  # (B, C), (N, C)
    sizes = [*matryoshka, vectors.shape[1]]
    losses = [info_nce(queries[:, :size], candidates[:, :size], temperature, compared) for size in sizes]
    return torch.stack(losses).mean()


def share_out(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Deals a batch's texts to the processes, longest first: equally many each, of like lengths.

    Returns:
        Indices of the texts that this process encodes, and each text's place among the gathered vectors.
    """
    order = np.argsort(-np.array(lengths), kind="stable")
    # where they cannot be shared equally, the first few once more
    dealt = np.resize(order, (-(-len(order) // world_size()), world_size())).T
    places = np.empty(len(order), dtype=np.int64)
    places[dealt.ravel()] = np.arange(dealt.size)
    return dealt[rank()], places


def filter_negatives(l2v: LLM2Vec, triplets: list[Triplet], share: float, max_length: int | None = None) -> list[Triplet]:
    """Without the hard negatives whose cosine with the query is above `share` of the positive's: most are right answers
    that nobody marked (arXiv 2407.15831). The model judges as it is now, the texts as they are trained on."""
    kept = []
    for start in range(0, len(triplets), 512):
        rows = triplets[start : start + 512]
        vectors = l2v.encode(l2v.tokenize(flatten(rows), max_length=max_length), normalize=True)
        cosines = np.einsum("nc,nc->n", vectors[owners(rows)], vectors[len(rows) :])  # of every candidate with its query
        agreed = to_device(torch.from_numpy(cosines), l2v.device)
        distributed.broadcast([agreed])  # rounded otherwise, another process might keep other negatives
        cosines = agreed.cpu().numpy()
        positives, negatives = cosines[: len(rows)], iter(cosines[len(rows) :])  # in the order of `flatten`
        for t, positive in zip(rows, positives, strict=True):
            own = [(text, next(negatives)) for text in t.negatives]
            kept.append(t._replace(negatives=tuple(text for text, cosine in own if cosine <= share * positive)))
    return kept


def explain(l2v: LLM2Vec, batch: list[Triplet], settings: Settings) -> str:
    """A batch in words: one triplet and how alike its texts are to the model, how many negatives, and the loss of guessing."""
    rows = [t._replace(negatives=tuple(text for text in t.negatives if text != t.query)[:1]) for t in batch[:32]]
    t = max(rows, key=lambda t: len(t.negatives))  # one with a negative that counts, if there is one
    shown = [("query", t.query), ("positive", t.positive), *(("negative", text) for text in t.negatives)]
    vectors = l2v.encode(l2v.tokenize(flatten([t]), max_length=settings.max_length), normalize=True)
    lines = [f"instruction of {'all texts' if t.symmetric else 'the query'}: {t.instruction}"] if t.instruction else []
    for (name, text), vector in zip(shown, vectors, strict=False):
        lines.append(f"{name:<9} cosine {vectors[0] @ vector:.3f}  {text[:200]}")
    encoded = l2v.tokenize(flatten(batch), max_length=settings.max_length)
    candidates = compared_in(batch, encoded, settings).sum(dim=1)
    low, high = int(candidates.min()) - 1, int(candidates.max()) - 1
    lines.append(f"negatives of a query: {low if low == high else f'{low} to {high}'}")
    if settings.in_batch_negatives:
        hard = sum(len(t.negatives) for t in batch)
        lines[-1] += f" ({len(batch) - 1} other positives, {hard} hard negatives, less what equals its query or positive)"
    guess = candidates.double().log().mean().item()
    lines.append(f"loss of guessing: {guess:.3f}, the logarithm of {math.exp(guess):.0f} candidates")
    return "\n".join(lines)


def train_supervised(
    l2v: LLM2Vec,
    sets: list[DataSet],
    settings: Settings,
    output: str | Path | None = None,
    *,
    evaluate: Callable[[], dict] | None = None,
    **loop_options,
) -> Loop:
    """Trains the adapter on `l2v.decoder` to find each query's positive.

    Args:
        l2v: with a fresh adapter (`add_lora`), earlier ones merged; its direction, pooling and chat template are kept.
        settings: `batch_size` counts triplets, `micro_batch_size` texts. Whole batches are compared, in however many
            micro-batches and processes they are computed.
    Raises:
        ValueError: what `draw` refuses; an instruction that leaves no room for a text; a matryoshka size out of range; a data
            set whose hard negatives are all filtered out, where only they count.
    """
    if len(set(settings.matryoshka)) < len(settings.matryoshka):
        raise ValueError(f"--matryoshka {' '.join(map(str, settings.matryoshka))}: expected each size once")
    if wrong := [size for size in settings.matryoshka if not 0 < size < l2v.width]:
        raise ValueError(
            f"--matryoshka {wrong[0]}: expected numbers from 1 to {l2v.width - 1}, the whole vector has {l2v.width}"
        )
    triplets = [triplet for data in sets for triplet in data.triplets]
    order = draw(sets, settings)
    # refuses an instruction that leaves no room for a text
    l2v.tokenize([(instruction, "a") for instruction in {t.instruction for t in triplets}], max_length=settings.max_length)
    if settings.filter_negatives:
        drawn = np.unique(np.concatenate(order))
        before = [triplets[i] for i in drawn]
        after = filter_negatives(l2v, before, settings.filter_negatives, settings.max_length)
        for i, triplet in zip(drawn, after, strict=True):
            triplets[i] = triplet
        # the drawn triplets of each data set, one of which may have no negative left
        ends = np.cumsum([len(data.triplets) for data in sets])
        for data, rows in zip(sets, np.split(drawn, np.searchsorted(drawn, ends[:-1])), strict=True):
            if len(rows):
                check_negatives(f"{data.name}, filtered,", [triplets[i] for i in rows], settings)
    loop = Loop(l2v.decoder, settings, output, evaluate=evaluate, **loop_options)
    if not loop.quiet:
        words = explain(l2v, [triplets[i] for i in order[0]], settings)  # in all processes or in none
        if settings.filter_negatives:
            hard, kept = (sum(len(t.negatives) for t in rows) for rows in (before, after))
            share = f"{settings.filter_negatives:.0%} of the positive's cosine"
            words = f"{hard - kept} of {hard} hard negatives left out: above {share}\n{words}"
        if loop.is_main:
            print(words)

    for step in loop:
        batch = [triplets[i] for i in order[step]]  # that of all processes
        encoded = l2v.tokenize(flatten(batch), max_length=settings.max_length)
        compared = to_device(compared_in(batch, encoded, settings), l2v.device)
        mine, where = share_out([len(row.ids) for row in encoded])
        places = to_device(torch.from_numpy(where), l2v.device)
        size = settings.micro_batch_size or len(mine)
        parts = [[encoded[i] for i in mine[start : start + size]] for start in range(0, len(mine), size)]

        def embed(part: int) -> Tensor:
            loop.seed_dropout(part)
            return pool(*l2v.states(parts[part]), l2v.pooling)  # (n, C)

        def loss_of(vectors: Tensor) -> Tensor:
            return supervised_loss(vectors[places], compared, settings.temperature, settings.matryoshka)

        loss = backward(embed, len(parts), loss_of)
        loop.update(loss, sum(len(row.ids) for row in encoded))
    return loop
