"""Counts the memory of tensors as they come and go: exact, on any machine, also for tensors that are only pretended."""

import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """`with PeakMemory(known) as memory: ...; memory.peak`: the most bytes that storages made inside held at once.

    Args:
        known: tensors that were there before, such as weights; what shares their memory is not counted.
    """

    def __init__(self, known=()):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += self.sizes[key]
                    weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


class FusedNorm(torch.autograd.Function):
    """Keeps what the GPU's fused RMS norm keeps: its input. The numbers are of no interest here."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[1], None


class FusedSwiGLU(torch.autograd.Function):
    """Keeps what one kernel for both operations keeps: its inputs."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return gate * up

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return gradient * up, gradient * gate


def like_a_cpu(monkeypatch) -> None:
    """Makes dropout do without numpy, whose draws cannot be pretended: it keeps its factors."""

    def dropout(x, probability, training):
        return x * torch.empty_like(x, requires_grad=False) if training and probability else x

    monkeypatch.setattr("llm2vec_min.model.dropout", dropout)
    monkeypatch.setattr("llm2vec_min.lora.dropout", dropout)


def like_a_gpu(monkeypatch) -> None:
    """Makes pretended CPU tensors keep what the GPU's kernels keep: dropout one byte a number, the norm no copy, SwiGLU its
    inputs, attention no probabilities."""

    def dropout(x, probability, training):
        return torch.native_dropout(x, probability, True)[0] if training and probability else x

    monkeypatch.setattr("llm2vec_min.model.dropout", dropout)
    monkeypatch.setattr("llm2vec_min.lora.dropout", dropout)
    monkeypatch.setattr("llm2vec_min.model.SHORT", {})  # no attention by hand; with attention dropout it would be all the same
    monkeypatch.setattr("llm2vec_min.model.swiglu", FusedSwiGLU.apply)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight))
