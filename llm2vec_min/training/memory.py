"""What a training step will need, from the shapes alone: parameters, operations, and peak memory by item.

Counted from what autograd keeps for the backward pass, tensor by tensor, as `model.py` and `lora.py` compute it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ..config import ModelConfig
from ..device import DTYPES, started, world_size
from ..files import short
from ..hub import resolve
from ..model import SHORT
from ..weights import base_of
from .mntp import LOGITS_AT_ONCE
from .settings import Settings


@dataclass
class Plan:
    """Parameters and tokens are counts, operations are floating-point ones per step, memory is bytes of one process."""

    parameters: int  # of the base: decoder, and output head for MNTP
    trained: int
    tokens: int  # of a step, over all processes; at most (every text as long as --max-length; simcse: both twins)
    operations: dict[str, float]
    memory: dict[str, float]
    lower: dict[str, str]  # item of memory -> how to make it smaller

    @property
    def peak(self) -> float:
        """Bytes. The recomputed layer and the logits are needed one after the other: the larger one counts."""
        rest = sum(size for item, size in self.memory.items() if item not in ("one layer", "logits"))
        return rest + max(self.memory["one layer"], self.memory["logits"])

    @property
    def largest(self) -> str:
        return max(self.memory, key=lambda item: self.memory[item])


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Numbers in the base's weights: `layer` (one of them), `embedding`, `head` (0 where it is the embedding)."""
    C, I, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    layer = C * D * (2 * H + 2 * K) + 3 * C * I + 2 * C
    if config.attention_bias:
        layer += D * (H + 2 * K) + (C if config.model_type != "qwen2" else 0)
    if config.mlp_bias:
        layer += 2 * I + C
    embedding = config.vocab_size * C
    return {"layer": layer, "embedding": embedding, "head": 0 if config.tie_word_embeddings else embedding}


def count_adapter(config: ModelConfig, r: int) -> int:
    """Numbers in the LoRA matrices of all layers: r x (in + out) for each of seven linear layers."""
    C, I, D = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    return config.num_hidden_layers * r * (2 * (C + q) + 2 * (C + kv) + 3 * (C + I))


def kept_per_token(config: ModelConfig, settings: Settings, size: int, on_gpu: bool) -> float:
    """Bytes that one layer keeps for its backward pass, per token, without checkpointing.

    Args:
        size: bytes of one number in the base's dtype.
        on_gpu: the CPU's norm keeps its input in float32, its dropout a factor where a GPU keeps a byte, and silu(gate), which
            a GPU's one kernel for SwiGLU computes again.
    """
    C, I = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = 2 * C * (size if on_gpu else 4)  # what enters each
    attention = (q + 2 * kv + q) * size + 4 * config.num_attention_heads  # q, k, v, the result, one sum per head
    swiglu = (2 if on_gpu else 3) * I * size  # gate, up, silu(gate)
    if settings.lora_dropout:  # each adapter's own input, and which numbers were kept
        adapters = (3 * C + q + 2 * C + I) * (size + (1 if on_gpu else size))
    else:  # q, k, v share theirs, gate and up too
        adapters = (C + C + I) * size
    adapters += 7 * settings.lora_r * size  # what lies between A and B
    return norms + attention + swiglu + adapters


def units(settings: Settings, stage: str, processes: int) -> int:
    """What a micro-batch counts, of one process's share of the batch: sequences; of triplets, the three texts."""
    return settings.batch_size // processes * (3 if stage == "supervised" else 1)


def plan(
    config: ModelConfig,
    settings: Settings,
    stage: str,
    *,
    size: int = 2,
    processes: int = 1,
    sharded: bool = False,
    on_gpu: bool = True,
) -> Plan:
    """Predicts a step of `mntp`, `simcse` or `supervised` (there with one hard negative of each query).

    Args:
        size: bytes of one number in the base's dtype: 2 for bfloat16, 4 for float32.
        processes: among which the batch is split.
        sharded: whether they also share the base (`--shard`).
    """
    is_mntp, is_simcse = stage == "mntp", stage == "simcse"
    C, V, L, T = config.hidden_size, config.vocab_size, config.num_hidden_layers, settings.max_length
    count, adapter = count_parameters(config), count_adapter(config, settings.lora_r)
    head = count["head"] if is_mntp else 0
    share = units(settings, stage, processes)
    part = min(settings.micro_batch_size or share, share)
    rows = 2 * part if is_simcse else part  # of one forward pass
    tokens = rows * T
    texts = {"simcse": 2, "supervised": 3}.get(stage, 1)  # of each row of a batch
    total = texts * settings.batch_size * T

    # ---- operations: 2 per weight and token ----
    layers, q = L * count["layer"], config.num_attention_heads * config.head_dim
    forward = 2 * total * (layers + adapter) + 4 * L * q * T * total  # the last is q k^T and the sum over v
    operations = {"forward": forward, "backward": 2 * total * (layers + 2 * adapter) + 8 * L * q * T * total}
    if settings.gradient_checkpointing:
        operations["recomputed by checkpointing"] = forward
    if not is_mntp and part < share:
        operations["vectors first (GradCache)"] = forward
    if is_mntp:
        chosen = settings.mask_probability * total
        again = 3 if settings.mask_probability * tokens * V > LOGITS_AT_ONCE else 2
        operations["logits"] = again * 2 * chosen * C * V

    # ---- memory ----
    kept = kept_per_token(config, settings, size, on_gpu) * tokens
    noisy = is_simcse and settings.attention_dropout > 0
    if not on_gpu and (noisy or T <= SHORT[size]):  # `attend` by hand: the probabilities; with dropout also factors and product
        kept += rows * config.num_attention_heads * T * T * (3 if noisy else 1) * size
    states = tokens * C * size
    whole = layers if not sharded else layers / processes + 2 * count["layer"]  # two: one runs, the next one arrives
    passing = tokens * (config.intermediate_size + 3 * C) * size  # while a layer's gradient is on its way
    logits = min(settings.mask_probability * tokens * V, LOGITS_AT_ONCE) * (12 + 2 * size) if is_mntp else 0
    memory = {
        "weights": (whole + count["embedding"] + head) * size,
        "adapter": 4 * adapter,
        "its gradient": 4 * adapter,
        "optimizer": 8 * adapter,
        "activations": (L * states if settings.gradient_checkpointing else L * kept) + 3 * states,
        "one layer": (kept if settings.gradient_checkpointing else 0) + passing,
        "logits": logits,
    }
    smaller = "a smaller --micro-batch-size"
    lower = dict.fromkeys(memory, smaller) | {
        "weights": "--dtype bfloat16" if size == 4 else "more GPUs" if sharded else "several GPUs with torchrun and --shard",
        **dict.fromkeys(("adapter", "its gradient", "optimizer"), "a smaller --lora-r"),
    }
    if not settings.gradient_checkpointing:
        lower["activations"] = f"--gradient-checkpointing or {smaller}"
    return Plan(layers + count["embedding"] + C + head, adapter, total, operations, memory, lower)


def fit(config: ModelConfig, settings: Settings, stage: str, free: float, said: Container[str] = (), **machine) -> Settings:
    """The settings with the checkpointing and the micro-batch that are fastest (fewest operations, then fewest passes) of
    those that fit.

    Args:
        free: bytes; a tenth of them is left alone.
        said: which of `gradient_checkpointing` and `micro_batch_size` are to stay as they are.
        machine: as for `plan`.
    """
    share = units(settings, stage, machine.get("processes", 1))
    whole = share if stage == "supervised" else 0  # as a number: queries with many negatives bring more texts than planned
    sizes = [whole, *(share >> n for n in range(1, share.bit_length()))]  # all, half, a quarter ... one
    sizes = [settings.micro_batch_size] if "micro_batch_size" in said else sizes
    kinds = [settings.gradient_checkpointing] if "gradient_checkpointing" in said else [False, True]
    ways = [replace(settings, micro_batch_size=size, gradient_checkpointing=kind) for size in sizes for kind in kinds]
    plans = [plan(config, way, stage, **machine) for way in ways]
    smallest = min(p.peak for p in plans)
    costs = [  # without the logits: to compute them twice costs less than to take smaller pieces
        (sum(n for name, n in p.operations.items() if name != "logits"), -(way.micro_batch_size or share), i)
        for i, (p, way) in enumerate(zip(plans, ways, strict=True))
        if p.peak <= max(0.9 * free, smallest)
    ]
    return ways[min(costs)[-1]]


def shape_of_run(model: str, device: str | None, dtype: str | None, sharded: bool) -> tuple[ModelConfig, dict]:
    """The model's config and the machine, as `plan` and `fit` take them; `WORLD_SIZE` counts the processes.

    Raises:
        ValueError: no such model.
    """
    wanted, seen = ("config.json", "adapter_config.json"), [model]
    while not ((folder := resolve(seen[-1], wanted)) / wanted[0]).is_file() and (folder / wanted[1]).is_file():
        base = base_of(folder)  # an adapter by itself names it
        if not base or base in seen:
            raise ValueError(f"{folder / wanted[1]}: base_model_name_or_path is {short(base)}, expected another model's name")
        seen.append(str(base))
    config = ModelConfig.from_folder(folder)
    processes = started()
    on_gpu = device.startswith("cuda") if device else torch.cuda.is_available()
    size = DTYPES[dtype or ("bfloat16" if on_gpu else "float32")].itemsize
    return config, dict(size=size, processes=processes, sharded=sharded, on_gpu=on_gpu)


def plan_run(model: str, stage: str, settings: Settings, *where) -> Plan:
    """The plan of what train.py was told, from the model's config.json alone; `where` as the last three of `shape_of_run`."""
    config, machine = shape_of_run(model, *where)
    return plan(config, settings, stage, **machine)


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU has left; of several processes' GPUs the least."""
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    if world_size() > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return int(free)


def is_out_of_memory(error: RuntimeError) -> bool:
    """A GPU's, or the CPU's, whose kind torch does not name."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory"))
        or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    )


def advise(plan: Plan, device: torch.device) -> str:
    """After running out of memory: what takes the most, and which flag lowers it."""
    return (
        f"{device} has too little memory. Of the {plan.peak / 1e9:.1f} GB that were to be expected, "
        f"{plan.memory[plan.largest] / 1e9:.1f} GB are {plan.largest}: try {plan.lower[plan.largest]}; --dry-run shows every item"
    )


def describe(plan: Plan) -> str:
    """The plan as a table for people."""
    lines = [
        f"parameters        {plan.parameters:>16,}",
        f"trained           {plan.trained:>16,}  ({plan.trained / (plan.parameters + plan.trained):.2%})",
        f"tokens per step   {plan.tokens:>16,}  at most",
        f"operations per step {sum(plan.operations.values()) / 1e12:>14,.2f}  x 10^12",
        *(f"    {name:<30} {value / 1e12:>9,.2f}" for name, value in plan.operations.items()),
        f"peak memory of each process {plan.peak / 1e9:>6,.2f}  GB",
        *(f"    {name:<30} {value / 1e9:>9,.2f}  less by {plan.lower[name]}" for name, value in plan.memory.items() if value),
    ]
    if plan.memory["logits"]:
        lines.append("    (one layer and the logits are needed one after the other: the larger one counts)")
    return "\n".join(lines)
