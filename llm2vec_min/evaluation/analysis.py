"""What changes inside: the analyses of LLM2Vec section 4, as functions for the notebooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..data import numbered_lines
from ..encoder import LLM2Vec
from .sentences import Score

TRIPLES = Path(__file__).parent.parent / "assets" / "text" / "future_tokens.tsv"
SAME = 1e-5  # cosines closer than this are equal: rounding


@torch.no_grad()
def direction_cosines(l2v: LLM2Vec, texts: list[str], parts: int = 5, batch_size: int = 32) -> np.ndarray:
    """How far the mask matters: cosine of the causal and the bidirectional state of each token of the texts.

    Returns:
        (num_hidden_layers + 1, parts): means after each layer (0 = embeddings), by the token's place in its text, from
        the first fifth to the last.
    """
    sums, counts = np.zeros((l2v.decoder.config.num_hidden_layers + 1, parts)), np.zeros(parts)
    for start in range(0, len(texts), batch_size):
        batch = l2v.tokenizer.collate(l2v.tokenize(texts[start : start + batch_size]), l2v.device)
        own = batch.pool_mask  # (B, T)
        order = own.cumsum(1) - 1
        place = (parts * order // own.sum(1, keepdim=True).clamp(min=1))[own].cpu().numpy()
        both = [l2v.decoder(batch.input_ids, batch.padding_mask, causal=c, all_layers=True) for c in (True, False)]
        counts += np.bincount(place, minlength=parts)
        for layer, (a, b) in enumerate(zip(*both, strict=True)):
            cosines = F.cosine_similarity(a[own].float(), b[own].float(), dim=-1).cpu().numpy()
            sums[layer] += np.bincount(place, cosines, minlength=parts)
    return sums / np.maximum(counts, 1)


@torch.no_grad()
def logit_lens(l2v: LLM2Vec, text: str, top: int = 3) -> tuple[list[str], list[list[list[str]]]]:
    """What each layer's state would predict if it were the last: the final norm and the output head on every layer.

    Returns:
        The tokens of the text, and layer -> position -> the `top` likeliest tokens, layer 0 = embeddings. A decoder keeps at
        position i what it expects at i + 1.
    Raises:
        ValueError: the encoder was loaded without lm_head=True.
    Source: nostalgebraist, interpreting GPT: the logit lens, 2020.
    """
    if l2v.lm_head is None:
        raise ValueError("the logit lens needs the output head: LLM2Vec.from_pretrained(..., lm_head=True)")
    (row,) = l2v.tokenize([text])
    ids = torch.from_numpy(row.ids)[None].to(l2v.device)
    *states, last = l2v.decoder(ids, causal=l2v.causal, all_layers=True)
    best = [l2v.lm_head(x).topk(top).indices[0] for x in (*map(l2v.decoder.norm, states), last)]  # (T, top) each
    return l2v.tokenizer.pieces(row.ids), [[l2v.tokenizer.pieces(ids) for ids in layer] for layer in best]


def read_triples(path: str | Path = TRIPLES) -> list[tuple[str, str, str, str]]:
    """(A, B, C, D) of each line: beginnings A that B and C continue in one sense, and D in another; ValueError if not."""
    rows = []
    for number, line in numbered_lines(path):
        fields = tuple(line.split("\t"))
        if line and (len(fields) != 4 or not all(fields)):
            raise ValueError(f"{path}:{number}: found {line[:60]!r}, expected A<tab>B<tab>C<tab>D")
        if line:
            rows.append(fields)
    return rows


@torch.no_grad()
def future_margins(l2v: LLM2Vec, triples: list[tuple[str, str, str, str]] | None = None) -> np.ndarray:
    """The future-token probe: does the vector of A know how the sentence goes on?

    The sentences A B, A C and A D are encoded and pooled over the tokens of A only.

    Returns:
        (N,) cosine of A B with A C minus that of A B with A D. 0 under a causal mask, where A sees nothing of what follows.
    Raises:
        ValueError: an encoder in bfloat16, whose rounding would count as knowledge.
    Source: LLM2Vec section 4.1.
    """
    if l2v.decoder.norm.weight.dtype != torch.float32:
        raise ValueError(f"the probe compares cosines that differ by {SAME}: load the encoder with dtype='float32'")
    margins = []
    for a, *rest in read_triples() if triples is None else triples:
        encoded = [l2v.tokenizer.encode([a], suffix=" " + r, max_length=l2v.max_length)[0] for r in rest]
        hidden, pool_mask = l2v.states(encoded)
        same, like, unlike = ((h[m].float()).mean(0) for h, m in zip(hidden, pool_mask, strict=True))
        margins.append(float(F.cosine_similarity(same, like, dim=0) - F.cosine_similarity(same, unlike, dim=0)))
    return np.array(margins)


def future_score(margins: np.ndarray) -> Score:
    """Share of triples x 100 that are ranked right, equal cosines counting half: 50 is a coin toss. Resampled by `compare`:
    `interval(*resample(score))`, and `paired` between two encoders on the same triples."""
    right = np.where(np.abs(margins) < SAME, 0.5, margins > 0)
    return Score(lambda rows: 100 * float(np.mean(right[rows])), np.arange(len(right)))
