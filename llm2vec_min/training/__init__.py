"""From a batch to an adapter: one file per stage, each with its whole method.

Read mntp, then simcse. They stand on loop (schedule, resume, metrics); pretrain makes a small Llama to begin with;
distributed and memory are for large ones; flags is what train.py can be told.
"""

from .loop import Loop, Settings
from .mntp import mask_tokens, mntp_loss, train_mntp
from .simcse import info_nce, train_simcse

__all__ = ["Loop", "Settings", "info_nce", "mask_tokens", "mntp_loss", "train_mntp", "train_simcse"]
