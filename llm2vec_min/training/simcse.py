"""Stage 2, unsupervised SimCSE (arXiv 2104.08821; LLM2Vec section 2.1): the whole method in one file.

Each sentence is encoded twice. Dropout makes its two vectors, the twins, differ a little. The loss pulls twins together
and pushes the batch's other sentences away, so that vectors come to depend on what the noise leaves alone: the meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import batches
from ..device import kept_random_state, rank, to_device, world_size
from ..encoder import LLM2Vec
from ..model import set_attention_dropout
from ..pooling import pool
from ..tokenizer import Encoded
from . import distributed
from .loop import Loop
from .settings import Settings


def info_nce(queries: Tensor, candidates: Tensor, temperature: float = 0.05, compared: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of finding candidate i among all candidates by its cosine with query i.

    Args:
        queries: (B, C); candidates: (N, C) with N >= B, candidate i being the positive of query i. Float32.
        temperature: divides the cosines; 0.05 is a scale of 20.
        compared: (B, N) bool, the candidates that each query is compared with, its positive among them; None: all.
    Returns:
        Scalar, in nats.
    """
    with torch.autocast(queries.device.type, enabled=False):  # not in bfloat16, whose cosines are 0.004 apart
        cosines = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T  # (B, N), in [-1, 1]
    if compared is not None:
        cosines = cosines.masked_fill(~compared, -torch.inf)
    return F.cross_entropy(cosines / temperature, torch.arange(len(queries), device=queries.device))


def twin_mask(sentence_id: Tensor) -> Tensor:
    """Which twins each sentence is compared with, (B, B) bool: its own, and those of all sentences that differ from it. Equal
    ones often meet, since a batch holds sentences of like length. sentence_id: (B,), equal for equal sentences."""
    return (sentence_id[:, None] != sentence_id) | torch.eye(len(sentence_id), dtype=torch.bool)


def embed_twins(l2v: LLM2Vec, encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Two embeddings (B, C) of each sentence, from one forward pass over the doubled batch: every row draws its own
    dropout. Pools the same tokens as inference does."""
    hidden, pool_mask = l2v.states(encoded + encoded)  # (2B, T, C), (2B, T)
    return pool(hidden, pool_mask, l2v.pooling).chunk(2)


def backward(embed: Callable[[int], Tensor], parts: int, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """One step's loss over the vectors of all processes, with its gradient added to that of the weights.

    The loss needs every vector of the batch at once; memory may hold the graph of one part only. So, with several parts
    (GradCache, arXiv 2101.06983): all vectors, without a graph; the loss's gradient with respect to each of them; then each
    part once more, with a graph and the same noise, to carry its vectors' gradients on to the weights.

    Args:
        embed: a part's number to its vectors, (n, ..., C), with the same noise each time that part is embedded.
        parts: how many this process has; every process must have as many vectors.
        loss_of: all vectors, process after process, to the loss.
    Returns:
        Scalar: this process's share of the loss.
    """
    with torch.set_grad_enabled(parts == 1):  # a single part keeps its graph, and needs no second pass
        mine = [embed(part) for part in range(parts)]
    vectors = distributed.all_gather(torch.cat(mine)).requires_grad_()  # those of all processes
    loss = loss_of(vectors) / world_size()  # each process computes all of it, and `update` adds the shares up
    loss.backward()  # as far as the vectors, and to weights in the loss itself, if it has any
    gradient = world_size() * vectors.grad.chunk(world_size())[rank()]  # undivided: no other process carries these on
    for part, of_part in enumerate(gradient.split([len(some) for some in mine])):
        again = mine[0] if parts == 1 else embed(part)
        again.backward(of_part)
    return loss


@torch.no_grad()
def explain(l2v: LLM2Vec, sentences: list[str], max_length: int) -> str:
    """Two sentences in words: how alike they are to the model, and how alike the twins of the first are."""
    encoded = l2v.tokenizer.encode(sentences[:2], max_length=max_length)
    a, b = l2v.encode(encoded, normalize=True)
    was_training = l2v.training
    l2v.train()
    with kept_random_state(l2v.device):
        torch.manual_seed(0)
        first, second = embed_twins(l2v, encoded[:1])
    l2v.train(was_training)
    twins = F.cosine_similarity(first, second).item()
    return f"A: {sentences[0]}\nB: {sentences[1]}\ncosine of A and B {a @ b:.3f}, of A and its twin {twins:.3f}"


def train_simcse(
    l2v: LLM2Vec,
    sentences: list[str],
    settings: Settings,
    output: str | Path | None = None,
    *,
    evaluate: Callable[[], dict] | None = None,
    **loop_options,
) -> Loop:
    """Trains the adapter on `l2v.decoder` to tell sentences apart.

    Args:
        l2v: with a fresh adapter (`add_lora`), earlier ones merged; causal or not.
        settings: `attention_dropout` and `lora_dropout` make the twins differ. The other sentences of the whole batch are
            the negatives, in however many micro-batches and processes it is computed.
    Raises:
        ValueError: fewer than two sentences, in all or in a batch; fewer than one batch; all sentences equal.
    """
    if min(len(sentences), settings.batch_size) < 2:
        raise ValueError(
            f"{len(sentences)} sentences in batches of {settings.batch_size}: negatives are the other sentences, so it takes two"
        )
    needed = settings.steps * settings.batch_size
    if len(sentences) > needed:  # do not tokenize a million sentences to use some
        chosen = np.random.default_rng(settings.seed).permutation(len(sentences))[:needed]
        sentences = [sentences[i] for i in chosen]
    encoded = l2v.tokenizer.encode(sentences, max_length=settings.max_length)  # no instruction, no template
    lengths = [len(row.ids) for row in encoded]
    numbers: dict[bytes, int] = {}
    sentence_id = torch.tensor([numbers.setdefault(row.ids.tobytes(), len(numbers)) for row in encoded])
    if len(numbers) == 1:
        raise ValueError(f"all {len(sentences)} sentences are the same to the model: there is nothing to tell apart")
    loop = Loop(l2v.decoder, settings, output, evaluate=evaluate, **loop_options)
    order = batches(len(encoded), settings.batch_size, settings.seed, loop.start, lengths=lengths)
    set_attention_dropout(l2v.decoder, settings.attention_dropout)
    try:
        if not loop.quiet:
            words = explain(l2v, sentences, settings.max_length)  # a sharded model runs in all processes or in none
            if loop.is_main:
                print(words)

        for _ in loop:
            rows = next(order)  # (B,), the batch of all processes
            parts = [[encoded[i] for i in rows[some]] for some in loop.micro_batches()]
            compared = to_device(twin_mask(sentence_id[rows]), l2v.device)

            def embed(part: int) -> Tensor:
                loop.seed_dropout(part)
                return torch.stack(embed_twins(l2v, parts[part]), dim=1)  # (b, 2, C)

            def loss_of(twins: Tensor) -> Tensor:
                return info_nce(twins[:, 0], twins[:, 1], settings.temperature, compared)

            loss = backward(embed, len(parts), loss_of)
            loop.update(loss, 2 * sum(lengths[i] for i in rows))
    finally:
        set_attention_dropout(l2v.decoder, 0.0)
    return loop
