"""An experiment: LoRA on layers that share an input (q, k, v; gate, up) as one autograd function, beside the plain layers.

    python tests/benchmarks/grouped.py --model $(python tests/build_smollm2.py)     # an MNTP step of 8 x 128 tokens, bfloat16
    python tests/benchmarks/grouped.py --shape 1.3b --batch 32 --length 512         # on a GPU, random weights of that shape

Autograd keeps, for each plain layer, the dropped-out input of its adapter. One function for all layers that read x keeps x
once and draws the dropout again from its seed. With the rows of all A side by side, for layers i that share x (N, in):

    a = s drop(x) A^T                     (N, k R)      y_i  = x W_i^T + a_i B_i^T
    dB_i = dy_i^T a_i                     (out_i, R)    da_i = s dy_i B_i
    dA = da^T drop(x)                     (k R, in)     dx   = sum_i dy_i W_i + drop'(da A)

The noise differs from PEFT's, which draws one for each layer; its expectation is the same.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
from gpu import SHAPES, RandomOurs, free
from peak_memory import PeakMemory
from speed import synchronize

from llm2vec_min import LLM2Vec
from llm2vec_min.device import pick_device
from llm2vec_min.lora import LoRALinear, add_lora
from llm2vec_min.model import Decoder
from llm2vec_min.training.mntp import mask_tokens, mntp_loss


def noise(x: Tensor, probability: float, seed: int) -> Tensor:
    """What dropout multiplies x by, 0 or 1 / (1 - p), the same for the same seed (on the CPU four draws of 16 bits from 64)."""
    if x.device.type != "cpu":
        generator = torch.Generator(x.device).manual_seed(seed)
        return torch.empty_like(x).bernoulli_(1 - probability, generator=generator) / (1 - probability)
    draws = torch.from_numpy(np.random.SFC64(seed).random_raw((x.numel() + 3) // 4).view(np.int16))[: x.numel()].view(x.shape)
    last = round(probability * 65536) - 32769
    return draws.clamp_(last, last + 1).sub_(last).to(x.dtype).mul_(1 / (1 - probability))


class GroupedLoRA(torch.autograd.Function):
    """(x W_i^T + s drop(x) A_i^T B_i^T for each i); x (N, in), W_i (out_i, in) frozen, A (k R, in), B_i (out_i, R)."""

    @staticmethod
    def forward(ctx, x, A, scaling, probability, seed, weights, *B):
        dropped = x * noise(x, probability, seed) if probability else x
        a = F.linear(dropped, A) * scaling
        ctx.save_for_backward(x, A, a, *B)
        ctx.rest = scaling, probability, seed, weights
        parts = a.chunk(len(B), dim=1)
        return tuple(F.linear(x, W).addmm_(part, b.T) for W, part, b in zip(weights, parts, B, strict=True))

    @staticmethod
    def backward(ctx, *dy):
        x, A, a, *B = ctx.saved_tensors
        scaling, probability, seed, weights = ctx.rest
        dB = [d.T @ part for d, part in zip(dy, a.chunk(len(B), dim=1), strict=True)]
        da = torch.cat([d @ b for d, b in zip(dy, B, strict=True)], dim=1) * scaling
        scale = noise(x, probability, seed) if probability else None
        dA = da.T @ (x if scale is None else x * scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = da @ A
            if scale is not None:
                dx *= scale
            for d, W in zip(dy, weights, strict=True):
                dx.addmm_(d, W)
        return dx, dA, None, None, None, None, *dB


class Member(nn.Module):
    """Stands where one layer of a group stood; the first one called computes them all."""

    def __init__(self, layers: list[LoRALinear], index: int, outputs: list):
        super().__init__()
        self.layers, self.index, self.outputs = nn.ModuleList(layers), index, outputs

    def forward(self, x: Tensor) -> Tensor:
        if self.index == 0:
            first = self.layers[0]
            A = torch.cat([layer.lora_A.weight for layer in self.layers]).to(x.dtype)
            B = [layer.lora_B.weight.to(x.dtype) for layer in self.layers]
            seed = int(torch.randint(2**62, ()))
            weights = [layer.weight for layer in self.layers]
            probability = first.dropout if self.training else 0.0
            rows = x.reshape(-1, x.shape[-1])
            self.outputs[:] = GroupedLoRA.apply(rows, A, first.scaling, probability, seed, weights, *B)
        return self.outputs[self.index].view(*x.shape[:-1], -1)


def group(decoder: Decoder) -> None:
    """Puts the function in the place of q, k, v and of gate, up, in every layer."""
    for layer in decoder.layers:
        for owner, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj"))):
            layers, outputs = [getattr(owner, name) for name in names], []
            for index, name in enumerate(names):
                setattr(owner, name, Member(layers, index, outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint folder")
    source.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = pick_device(args.device)
    times: dict[str, list[float]] = {"plain": [], "grouped": []}
    peaks, sides = {}, {}
    for name in times:
        if args.model:
            l2v = LLM2Vec.from_pretrained(args.model, dtype="bfloat16", lm_head=True, device=device)
        else:
            l2v = RandomOurs(args.shape, device, checkpointing=False).l2v
        torch.manual_seed(0)
        add_lora(l2v.decoder)
        if name == "grouped":
            group(l2v.decoder)
        l2v.decoder.train()
        sides[name] = l2v
    vocab_size = l2v.decoder.config.vocab_size
    ids = torch.randint(1000 % vocab_size, vocab_size, (args.batch, args.length))
    batch = [t.to(device) for t in mask_tokens(ids, mask_id=5, special_ids=set(), vocab_size=vocab_size)]

    def step(l2v: LLM2Vec) -> None:
        mntp_loss(l2v.decoder, l2v.lm_head, *batch).backward()

    for name, l2v in sides.items():  # the warm-up counts memory
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(l2v)
            peaks[name] = torch.cuda.max_memory_allocated() - before
        else:
            with PeakMemory([*l2v.decoder.parameters(), l2v.lm_head.weight]) as memory:
                step(l2v)
            peaks[name] = memory.peak
        l2v.decoder.zero_grad(set_to_none=True)
        free(device)
    for _ in range(args.repeats):
        for name, l2v in sides.items():
            synchronize(device)
            start = time.perf_counter()
            step(l2v)
            synchronize(device)
            times[name].append(time.perf_counter() - start)
            l2v.decoder.zero_grad(set_to_none=True)
    for name, seconds in times.items():
        print(
            f"{name:<8} {statistics.median(seconds):.3f} s a step (median of {args.repeats}), "
            f"{peaks[name] / 1e9:.2f} GB above the weights"
        )


if __name__ == "__main__":
    main()
