"""From a batch to an adapter: one file per stage, mntp and simcse each with its whole method.

Read these, then supervised, which takes the loss from simcse and its data from triplets. They stand on settings, loop
(optimizer, metrics, resume) and output (the run's folder); pretrain makes a small Llama to begin with; distributed and memory
are for large ones; flags is what train.py can be told.
"""

from .loop import Loop
from .mntp import mask_tokens, mntp_loss, train_mntp
from .output import finish_output
from .settings import Settings
from .simcse import info_nce, train_simcse
from .supervised import train_supervised
from .triplets import DataSet, Triplet, read_triplets

__all__ = [
    "DataSet",
    "Loop",
    "Settings",
    "Triplet",
    "finish_output",
    "info_nce",
    "mask_tokens",
    "mntp_loss",
    "read_triplets",
    "train_mntp",
    "train_simcse",
    "train_supervised",
]
