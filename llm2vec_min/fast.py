"""Operations that are faster than their plain versions. Each computes what its plain version does; dropout with other
random numbers."""

from __future__ import annotations

import functools
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# what torch.compile needs on CUDA
CAN_COMPILE = (
    find_spec("triton") is not None
    and any(map(shutil.which, ("gcc", "clang")))
    and Path(sysconfig.get_path("include"), "Python.h").is_file()
)


def fused(function: Callable) -> Callable:
    """A chain of element-wise operations as one kernel on CUDA, where each alone waits for memory; elsewhere as written."""
    compiled = None

    @functools.wraps(function)
    def run(x: Tensor, *others: Tensor) -> Tensor:
        nonlocal compiled
        if not (x.is_cuda and CAN_COMPILE) or torch.compiler.is_compiling():  # --compile fuses it in
            return function(x, *others)
        if compiled is None:  # on first use: to import the compiler takes seconds
            compiled = torch.compile(function, dynamic=True)
            torch._dynamo.config.error_on_nested_fx_trace = False  # else, in torch 2.9, a second thread fails meanwhile
        return compiled(x, *others)

    return run


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """F.dropout, but in less than half its time on the CPU, where random numbers are drawn one after the other: numpy's faster ones
    are taken, seeded by torch, and 64 bits serve four elements. So the probability is a multiple of 1 / 65536, never 0 or 1."""
    if not training or probability == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # numpy's draws do not compile
        return F.dropout(x, probability)
    bits = np.random.SFC64(int(torch.randint(2**62, (), device=x.device))).random_raw((x.numel() + 3) // 4)
    draws = torch.from_numpy(bits.view(np.int16))[: x.numel()].view(x.shape)  # uniform in [-32768, 32767]
    last = min(max(round(probability * 65536), 1), 65535) - 32769  # the highest draw that drops
    kept = draws.clamp_(last, last + 1).sub_(last)  # 0 or 1, in half the time of a comparison
    return x * kept.to(x.dtype).mul_(1 / (1 - probability))


def compile_layers(decoder: nn.Module) -> None:
    """Lets torch.compile fuse the operations of every layer."""
    # Training and evaluation, with and without gradient, padded or not, make a graph each. Past its limit of 8, torch would
    # run some eagerly, with other random numbers: GradCache's two passes over the same sentences would no longer agree.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in decoder.layers:
        layer.compile()
