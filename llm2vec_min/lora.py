"""LoRA by hand (arXiv 2106.09685): a frozen linear layer plus a trainable product of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fast import dropout

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """y = x W^T + b + (alpha / r) * dropout(x) A^T B^T, with W and b frozen.

    An nn.Linear with two children, so that its weights keep their names and the adapter's get PEFT's
    (`lora_A.weight` (R, in), `lora_B.weight` (out, R)). A and B are float32 whatever the base is, so that small updates
    are not rounded away; the products run in the base's dtype. B starts at zero: a fresh adapter changes nothing.
    The dropout is on activations, new for every token. On weights instead it would be one noise for a whole batch,
    both twins of a SimCSE pair included.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.r, self.alpha, self.dropout = r, alpha, dropout
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (N, in)
        y = F.linear(rows, self.weight, self.bias)  # (N, out)
        a = F.linear(dropout(rows, self.dropout, self.training), self.lora_A.weight.to(x.dtype)) * self.scaling  # (N, R)
        # in place, into y: no second tensor of its size
        return y.addmm_(a, self.lora_B.weight.to(a.dtype).T).view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + (alpha / r) B A, summed in float32, in W's dtype; (out, in)."""
        update = self.scaling * self.lora_B.weight @ self.lora_A.weight
        return (self.weight.float() + update).to(self.weight.dtype)

    def merged(self) -> nn.Linear:
        """The plain layer that computes the same (without dropout)."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)  # which an adapter put on it will take over


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def add_lora(
    model: nn.Module, r: int = 16, alpha: float = 32.0, dropout: float = 0.05, targets: Iterable[str] = TARGET_MODULES
) -> list[str]:
    """Freezes the model and puts a fresh adapter on its linear layers.

    Args:
        r: rank. The update is scaled by alpha / r (for rank-stabilised LoRA, arXiv 2312.03732, pass alpha * sqrt(r)).
        dropout: probability, on what enters the adapter.
        targets: last names of layers (`q_proj`), or whole ones (`layers.0.self_attn.q_proj`).
    Returns:
        Names of the layers that got one.
    Raises:
        ValueError: a target that fits no linear layer, a model that has an adapter already, a rank, alpha or dropout out of range.
    """
    if r < 1:
        raise ValueError(f"LoRA rank is {r}, expected at least 1")
    if not alpha > 0:
        raise ValueError(f"LoRA alpha is {alpha}, expected a number above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRA dropout is {dropout}, expected at least 0 and below 1")
    if adapted := [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]:
        raise ValueError(f"{adapted[0]} has an adapter already; merge it first")
    targets = {targets} if isinstance(targets, str) else set(targets)
    chosen, used = [], set()
    for name, module in model.named_modules():
        hits = targets & {name, name.rpartition(".")[2]}
        if hits and isinstance(module, nn.Linear):
            chosen.append(name)
            used |= hits
    if targets - used:
        named = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ValueError(f"no linear layer is named {', '.join(sorted(targets - used))}, found {', '.join(sorted(named))}")
    model.requires_grad_(False)
    for name in chosen:
        _replace(model, name, LoRALinear(model.get_submodule(name), r, alpha, dropout))
    return chosen


def merge_lora(model: nn.Module) -> None:
    """Folds every adapter into its layer, in place, one at a time: memory grows by one layer, not by the model. `model.changes`
    counts: by it `save_run` notices a base that is no longer the checkpoint it names."""
    names = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    with torch.no_grad():
        for name in names:  # names, because a list of the modules would keep each unmerged weight to the end
            _replace(model, name, model.get_submodule(name).merged())
    model.changes = getattr(model, "changes", 0) + bool(names)
