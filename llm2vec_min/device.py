"""Where it runs: on which device, in which dtype, and as which of several processes (one per GPU, as `torchrun` starts
them; without it, one process alone)."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str | torch.device | None) -> torch.device:
    """The named device, or the first GPU if there is one, else the CPU.

    Raises:
        ValueError: a device that this machine does not have.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError("it holds no numbers" if device.type == "meta" else "there is one CPU")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(name)!r} is not available ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew, at length, for every shape of a batch
    return device


def pick_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named dtype of weights and products, or what suits the device: bfloat16 on a GPU, float32 on the CPU.

    Raises:
        ValueError: another dtype than these two.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(name, name)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return dtype


def use_deterministic() -> None:
    """The same numbers in every run on a GPU too, some operations slower; one that cannot raises. Before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # for --compile: no choice by what was faster this time
    os.environ.setdefault("TORCHINDUCTOR_SHAPE_PADDING", "0")
    torch.use_deterministic_algorithms(True)


def kept_random_state(device: torch.device) -> AbstractContextManager:
    """Restores torch's random state, the CPU's and a CUDA device's, after the block."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def to_device(x: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """A tensor from the host. To a GPU it goes from page-locked memory, so that the host does not wait for it."""
    on_gpu = device is not None and device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if on_gpu else x.to(device)


def start_process(device: str | None, patience: float | None = None) -> torch.device:
    """Joins the other processes if `torchrun` started this one, and picks the device: on GPUs, each process its own.

    Args:
        patience: hours that one waits for another; default: torch's own (10 minutes on GPUs, else 30).
    Raises:
        ValueError: a device that this machine does not have.
    """
    if started() == 1:
        return pick_device(device)
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    picked = pick_device(device)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo", timeout=patience and timedelta(hours=patience))
    return picked


def started() -> int:
    """How many processes `torchrun` has started, as WORLD_SIZE says; before they have found each other."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"WORLD_SIZE is {said!r}, expected the number of processes")
    return int(said)


def stop_process() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0. Process 0 writes files and reports."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
