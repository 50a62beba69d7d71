"""Stage 0: what comes before LLM2Vec. A small Llama from scratch on text: tokenizer, next-token loss, loop.

Nobody needs it to use LLM2Vec, whose point is to start from a model that others have pretrained. It makes the
checkpoint that ships with this package, and shows where a decoder comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ..data import batches
from ..files import write_json
from ..model import LanguageModel
from .loop import Loop
from .settings import Settings

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(lines: list[str], vocab_size: int, folder: Path) -> None:
    """Byte-level BPE over the lines, written as tokenizer.json and tokenizer_config.json.

    Byte-level, so every text encodes; a space put before each text, as in Llama 2, so that a word is the same token at
    its beginning; digits one by one; the underscore always alone, because it is LLM2Vec's mask token; BOS first.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("_"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    try:
        tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{folder}: the tokenizer could not be written ({error})") from None
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    )


def next_token_loss(model: LanguageModel, input_ids: Tensor) -> Tensor:
    """Mean of -log p(x_i | x_<i) over positions 1 to T-1 of (B, T) ids: the causal language model's loss."""
    hidden = model.model(input_ids[:, :-1], causal=True)  # (B, T-1, C)
    logits = model.lm_head(hidden)  # (B, T-1, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())


def held_out_loss(model: LanguageModel, blocks: np.ndarray, batch_size: int) -> float:
    """Mean next-token loss in nats over whole blocks, (N, T)."""
    device = model.lm_head.weight.device
    losses = []
    for start in range(0, len(blocks), batch_size):
        ids = torch.from_numpy(blocks[start : start + batch_size]).long().to(device)
        losses += [next_token_loss(model, ids).item()] * len(ids)
    return float(np.mean(losses))


def pretrain(
    model: LanguageModel,
    train_blocks: np.ndarray,
    held_out: np.ndarray,
    settings: Settings,
    output: str | Path | None = None,
    *,
    tokenizer=None,
    bfloat16: bool = False,
    compiled: bool = False,
    evaluate: Callable[[], dict] | None = None,
    **loop_options,
) -> Loop:
    """Trains all weights, float32, with bfloat16 products if asked.

    Args:
        train_blocks, held_out: (N, T) and (M, T) ids.
        tokenizer: the package's `Tokenizer` of the blocks, saved with a new run.
        compiled: fuse the forward and backward passes with torch.compile (a minute first, then faster).
    """
    device = model.lm_head.weight.device

    def report() -> dict:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = held_out_loss(model, held_out, settings.batch_size)
        return {"held_out_loss": loss, "perplexity": float(np.exp(loss))} | (evaluate() if evaluate else {})

    loss_function = torch.compile(next_token_loss) if compiled else next_token_loss
    loop = Loop(model, settings, output, evaluate=report, **loop_options)
    order = batches(len(train_blocks), settings.batch_size, settings.seed, loop.start)
    if tokenizer is not None and loop.is_new:
        loop.open()
        tokenizer.save(loop.output)
    for _ in loop:
        ids, total = torch.from_numpy(train_blocks[next(order)]).long().to(device), 0.0  # (B, T)
        for rows in loop.micro_batches():
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss = loss_function(model, ids[rows]) * (len(ids[rows]) / len(ids))
            loss.backward()
            total = total + loss.detach()
        loop.update(total, tokens=ids.numel())
    return loop
