"""Training in several processes: gradients added up, vectors gathered, the base spread over them.

Each process holds the model and the whole adapter, and trains on its share of every batch. Gradients are added up once
a step, in one message after the backward pass: an adapter is small, and so GradCache, checkpointing and micro-batches need
none of the hooks by which DistributedDataParallel sends while it computes. With `shard` the frozen base is spread over the
processes and each layer is put together only while it runs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..device import world_size
from ..lora import LoRALinear
from ..model import Decoder


def all_reduce(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes; the same shapes and one dtype everywhere."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def all_gather(x: Tensor) -> Tensor:
    """The rows of all processes in order, (n, ...) -> (world_size * n, ...), without a gradient."""
    if world_size() == 1:
        return x.detach()
    rows = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(rows, x.detach().contiguous())
    return rows


def shard(decoder: Decoder, device: torch.device) -> None:
    """Spreads the frozen weights of every layer over the processes (FSDP2), in place.

    Adapters, embeddings and the last norm stay whole on each device. The decoder may lie in host memory: its layers
    move to the device one by one, so a model larger than the device can be loaded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    adapters = [child for m in decoder.modules() if isinstance(m, LoRALinear) for child in (m.lora_A, m.lora_B)]
    for module in (*adapters, decoder.embed_tokens, decoder.norm):
        module.to(device)
    whole = {p for module in (*adapters, decoder.embed_tokens, decoder.norm) for p in module.parameters()}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # The root holds nothing of its own; it lets a layer be fetched while the one before it runs.
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def broadcast(tensors: list[Tensor]) -> None:
    """Process 0's values for everyone, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)
