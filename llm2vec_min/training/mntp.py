"""Stage 1, masked next token prediction (LLM2Vec section 2.1): the whole method in one file.

Some tokens are hidden and the model, now looking both ways, has to say what they were. As in BERT, but the prediction
for position i is read at position i - 1, because that is where this decoder has learned to keep its next token:

    position    0     1     2     3     4
    text        <s>   the   cat   sat   down
    input       <s>   the   _     sat   down
    says              cat                       the state of position 1 has to name the token of position 2
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data import batches
from ..device import to_device, world_size
from ..encoder import LLM2Vec
from ..model import Decoder
from ..tokenizer import Tokenizer
from .loop import Loop
from .settings import Settings

MASK_STYLES = ("bert", "all")
IGNORED = -100  # label of a position that is not predicted
LOGITS_AT_ONCE = 2**26  # numbers, 256 MB in float32, in training and in evaluation


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
    if not 0 < probability <= 1:
        raise ValueError(f"mask probability is {probability}, expected a number in (0, 1]")

    maskable = ~torch.isin(input_ids, torch.tensor(sorted(special_ids), dtype=torch.int64))
    maskable[:, 0] = False
    chosen = (torch.rand(input_ids.shape, generator=generator) < probability) & maskable
    labels = input_ids.masked_fill(~chosen, IGNORED)
    if style == "all":
        masked_ids = input_ids.masked_fill(chosen, mask_id)
    elif style == "bert":
        fate = torch.rand(input_ids.shape, generator=generator)
        random_ids = torch.randint(vocab_size, input_ids.shape, generator=generator)
        masked_ids = input_ids.masked_fill(chosen & (fate < 0.8), mask_id)
        masked_ids = torch.where(chosen & (fate >= 0.9), random_ids, masked_ids)
    else:
        raise ValueError(f"mask style is {style!r}, expected one of {', '.join(MASK_STYLES)}")
    return masked_ids, labels


def chosen_states(decoder: Decoder, masked_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For the M chosen positions, the states that predict them (M, C), each one position to the left of its token, and
    the true ids (M,). Keep labels on the CPU: the host would have to wait for a GPU to learn M."""
    hidden = decoder(masked_ids, causal=False)  # (B, T, C)
    next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # (B * T,), what each position has to predict
    where = (next_labels != IGNORED).nonzero().squeeze(1)  # (M,)
    targets = to_device(next_labels[where], hidden.device)
    return hidden.flatten(0, 1).index_select(0, to_device(where, hidden.device)), targets


def mntp_loss(decoder: Decoder, lm_head: nn.Linear, masked_ids: Tensor, labels: Tensor, count: int | None = None) -> Tensor:
    """Mean of -log p(x_i | h_{i-1}) over the chosen positions i, in nats; 0 when none is chosen. The head, the model's
    widest matrix, runs on no other position.

    Args:
        count: divide by this instead of M: the chosen positions of a whole batch of which these rows are a part.
    """
    hidden, targets = chosen_states(decoder, masked_ids, labels)
    chunk = LOGITS_AT_ONCE // lm_head.out_features

    def summed(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")

    if len(targets) <= chunk:
        total = summed(hidden, targets)
    else:  # logits of one chunk at a time, computed once more for the gradient
        chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        total = sum(checkpoint(summed, *both, use_reentrant=False, preserve_rng_state=False) for both in chunks)
    return total / (max(1, len(targets)) if count is None else count)


@torch.no_grad()
def held_out_score(l2v: LLM2Vec, blocks: np.ndarray, settings: Settings) -> dict:
    """MNTP loss and accuracy on (N, T) blocks, under the same masks at each call: those of the run's own mask style and
    probability, so runs that differ in these cannot be compared by it."""
    generator = torch.Generator().manual_seed(settings.seed)
    # all at once: the masks, and so the score, do not depend on the batch size
    masked_ids, labels = mask_tokens(torch.from_numpy(blocks).long(), **masking(l2v, settings), generator=generator)
    loss, correct, count = 0.0, 0, 0  # the first two stay on the device until the end
    size = settings.micro_batch_size or settings.batch_size // world_size()  # as many as in training
    chunk = LOGITS_AT_ONCE // l2v.lm_head.out_features
    for ids, wanted in zip(masked_ids.split(size), labels.split(size), strict=True):
        hidden, targets = chosen_states(l2v.decoder, to_device(ids, l2v.device), wanted)
        for some, true in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = l2v.lm_head(some).float()
            loss = loss + F.cross_entropy(logits, true, reduction="sum")
            correct = correct + (logits.argmax(-1) == true).sum()
        count += len(targets)
    return {"held_out_loss": float(loss) / max(1, count), "held_out_accuracy": float(correct) / max(1, count)}


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
    output: str | Path | None = None,
    *,
    evaluate: Callable[[], dict] | None = None,
    **loop_options,
) -> Loop:
    """Trains the adapter on `l2v.decoder` to predict masked tokens; the base and `l2v.lm_head` are frozen.

    Args:
        l2v: loaded with lm_head=True, with a fresh adapter (`add_lora`).
        train_blocks, held_out: (N, T) and (M, T) ids, from `pack_blocks`.
        evaluate: more numbers to report with the held-out loss and accuracy.
    Raises:
        ValueError: a causal encoder, or one without its output head.
    """
    if l2v.causal:
        raise ValueError("MNTP trains a bidirectional encoder, and this one is causal: causal=False, or --no-causal, turns it")
    if l2v.lm_head is None:
        raise ValueError("MNTP needs the output head: LLM2Vec.from_pretrained(..., lm_head=True)")

    def report() -> dict:
        return held_out_score(l2v, held_out, settings) | (evaluate() if evaluate else {})

    fixed = masking(l2v, settings)
    loop = Loop(l2v.decoder, settings, output, evaluate=report, **loop_options)
    order = batches(len(train_blocks), settings.batch_size, settings.seed, loop.start)
    if not loop.quiet and loop.is_main:
        ids = torch.from_numpy(train_blocks[:1]).long()
        masked_ids, labels = mask_tokens(ids, **fixed, generator=torch.Generator().manual_seed(settings.seed))
        print(explain(l2v.tokenizer, ids[0], masked_ids[0], labels[0]))

    for _ in loop:
        ids = torch.from_numpy(train_blocks[next(order)]).long()  # (B, T), the batch of all processes
        masked_ids, labels = mask_tokens(ids, **fixed, generator=loop.generator)
        count = max(1, int((labels != IGNORED).sum()))  # of the whole batch
        total = 0.0
        for part, rows in enumerate(loop.micro_batches()):
            loop.seed_dropout(part)
            ids_in = to_device(masked_ids[rows], l2v.device)
            loss = mntp_loss(l2v.decoder, l2v.lm_head, ids_in, labels[rows], count)
            loss.backward()
            total = total + loss.detach()
        loop.update(total, ids.numel())
    return loop
