"""Stage 1, masked next token prediction (LLM2Vec section 2.1): the whole method in one file.

Some tokens are hidden and the model, now looking both ways, has to say what they were. As in BERT, but the prediction
for position i is read at position i - 1, because that is where this decoder has learned to keep its next token:

    tokens      <s>   the    _   sat   down
    predicts           .    cat               read from the state of "the", the position before the mask
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import batches
from .encoder import LLM2Vec
from .model import Decoder
from .tokenizer import Tokenizer
from .training import Loop, Settings

MASK_STYLES = ("bert", "all")
IGNORED = -100  # label of a position that is not predicted


def mask_tokens(
    input_ids: Tensor,
    *,
    mask_id: int,
    special_ids: set[int],
    vocab_size: int,
    probability: float = 0.2,
    style: str = "bert",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hides some tokens.

    Args:
        input_ids: (B, T) int64 on the CPU.
        special_ids: never masked, nor is position 0, which no position precedes.
        probability: share of the other tokens that is chosen, each on its own.
        style: "bert": of the chosen 80 % become the mask token, 10 % a random token, 10 % stay; "all": all masked.
    Returns:
        The ids to feed, and labels: the true id where one was chosen, -100 elsewhere; both (B, T) int64.
    Raises:
        ValueError: an unknown style, or a probability outside (0, 1].
    Source: LLM2Vec section D.1 (style and probability per model); BERT (arXiv 1810.04805) section 3.1.
    """
    if style not in MASK_STYLES:
        raise ValueError(f"mask style is {style!r}, expected one of {', '.join(MASK_STYLES)}")
    if not 0 < probability <= 1:
        raise ValueError(f"mask probability is {probability}, expected a number in (0, 1]")

    def draw() -> Tensor:
        return torch.rand(input_ids.shape, generator=generator)

    maskable = ~torch.isin(input_ids, torch.tensor(sorted(special_ids), dtype=torch.int64))
    maskable[:, 0] = False
    chosen = (draw() < probability) & maskable
    labels = input_ids.masked_fill(~chosen, IGNORED)
    fate = draw()
    random_ids = torch.randint(vocab_size, input_ids.shape, generator=generator)
    masked_ids = input_ids.masked_fill(chosen & (fate < 0.8) if style == "bert" else chosen, mask_id)
    if style == "bert":
        masked_ids = torch.where(chosen & (fate >= 0.9), random_ids, masked_ids)
    return masked_ids, labels


def mntp_logits(decoder: Decoder, lm_head: nn.Linear, masked_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions for the M chosen positions only: logits (M, V) float32, each read one position to the left of its
    token, and the true ids (M,). The head, the widest product of the model, runs on no other position."""
    hidden = decoder(masked_ids, causal=False)  # (B, T, C)
    targets = labels[:, 1:]  # position 0 has no predecessor
    chosen = targets != IGNORED  # (B, T-1)
    return lm_head(hidden[:, :-1][chosen]).float(), targets[chosen]


def mntp_loss(decoder: Decoder, lm_head: nn.Linear, masked_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p(x_i | h_{i-1}) over the chosen positions i, in nats; 0 when none is chosen."""
    logits, targets = mntp_logits(decoder, lm_head, masked_ids, labels)
    return F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))


@torch.no_grad()
def held_out_score(l2v: LLM2Vec, blocks: np.ndarray, settings: Settings) -> dict:
    """MNTP loss and accuracy on (N, T) blocks, under the same masks at each call."""
    generator = torch.Generator().manual_seed(settings.seed)
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(blocks), settings.batch_size):
        ids = torch.from_numpy(blocks[start : start + settings.batch_size]).long()
        masked_ids, labels = mask_tokens(ids, **masking(l2v, settings), generator=generator)
        logits, targets = mntp_logits(l2v.decoder, l2v.lm_head, masked_ids.to(l2v.device), labels.to(l2v.device))
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
        count += len(targets)
    return {"held_out_loss": loss / max(1, count), "held_out_accuracy": right / max(1, count)}


def masking(l2v: LLM2Vec, settings: Settings) -> dict:
    """The arguments of `mask_tokens` that stay the same for a whole run."""
    return dict(
        mask_id=l2v.tokenizer.mask_id(),
        special_ids=l2v.tokenizer.special_ids,
        vocab_size=min(l2v.tokenizer.backend.get_vocab_size(), l2v.decoder.config.vocab_size),
        probability=settings.mask_probability,
        style=settings.mask_style,
    )


def explain(tokenizer: Tokenizer, ids: Tensor, masked_ids: Tensor, labels: Tensor, most: int = 24) -> str:
    """One row, (T,) each, in words: the text, what the model sees, and which position predicts what."""
    true, seen = tokenizer.pieces(ids[:most]), tokenizer.pieces(masked_ids[:most])
    lines = ["text:  " + " ".join(true), "input: " + " ".join(seen)]
    for i in range(1, min(most, len(ids))):
        if labels[i] != IGNORED:
            lines.append(f"  position {i - 1} ({seen[i - 1]!r}) predicts position {i}: {true[i]!r} (shown as {seen[i]!r})")
    return "\n".join(lines)


def train_mntp(
    l2v: LLM2Vec,
    train_blocks: np.ndarray,
    held_out: np.ndarray,
    settings: Settings,
    output: Path | None = None,
    *,
    evaluate: Callable[[], dict] | None = None,
    **loop_options,
) -> Loop:
    """Trains the adapter on `l2v.decoder` to predict masked tokens; the base and `l2v.lm_head` are frozen.

    Args:
        l2v: loaded with lm_head=True, with a fresh adapter (`add_lora`).
        train_blocks, held_out: (N, T) and (M, T) ids, from `pack_blocks`.
        evaluate: more numbers to report with the held-out loss and accuracy.
    """
    if l2v.causal:
        raise ValueError("MNTP trains a bidirectional encoder, found causal=True")

    def report() -> dict:
        return held_out_score(l2v, held_out, settings) | (evaluate() if evaluate else {})

    fixed = masking(l2v, settings)
    loop = Loop(l2v.decoder, settings, output, evaluate=report, **loop_options)
    order = batches(len(train_blocks), settings.batch_size, settings.seed, loop.start * settings.gradient_accumulation)
    if not loop.quiet:
        ids = torch.from_numpy(train_blocks[:1]).long()
        masked_ids, labels = mask_tokens(ids, **fixed, generator=torch.Generator().manual_seed(settings.seed))
        print(explain(l2v.tokenizer, ids[0], masked_ids[0], labels[0]))

    for _ in loop:
        total, tokens = 0.0, 0
        for _ in range(settings.gradient_accumulation):
            ids = torch.from_numpy(train_blocks[next(order)]).long()  # (B, T)
            masked_ids, labels = mask_tokens(ids, **fixed)
            loss = mntp_loss(l2v.decoder, l2v.lm_head, masked_ids.to(l2v.device), labels.to(l2v.device))
            loss = loss / settings.gradient_accumulation
            loss.backward()
            total, tokens = total + loss.detach(), tokens + ids.numel()
        loop.update(total, tokens)
    return loop
