"""How a stage trains, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine")


@dataclass
class Settings:
    """How to train; every field is the `train.py` flag of that name. Fields of other stages are ignored. Only
    train.py reads the LoRA fields: if you call `train_mntp` or the like yourself, call `add_lora` first.

    Raises:
        ValueError: an unknown schedule.
    """

    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # sequences (supervised: triplets) per optimizer step, over all processes
    micro_batch_size: int = 0  # sequences (simcse: twins, supervised: texts) per forward pass; 0: a process's whole share
    max_length: int = 512  # tokens
    lr: float = 5e-5  # peak
    warmup_steps: int = 0
    schedule: str = "linear"  # decay to zero: linear or cosine
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0  # 0: no clipping
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    mask_probability: float = 0.2
    mask_style: str = "bert"
    attention_dropout: float = 0.3
    temperature: float = 0.05  # cosine / temperature; 0.05 is the paper's scale of 20
    in_batch_negatives: bool = True
    filter_negatives: float = 0.0  # share of the positive's cosine; 0: keep all hard negatives
    matryoshka: tuple[int, ...] = ()  # sizes of shorter vectors to train, too
    gradient_checkpointing: bool = False  # True switches it on; a decoder where it is on keeps it
    seed: int = 0
    eval_every: int = 0  # steps; 0: a quarter of the run
    save_every: int = 0  # steps; 0: by the clock, every SAVE_SECONDS

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")


def get_lr(step: int, settings: Settings) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warmup, then linear or cosine decay to zero."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)  # in [0, 1)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (1 - progress)
