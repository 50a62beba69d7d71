"""A Llama, Mistral or Qwen2 decoder that looks back only (causal) or both ways (bidirectional).

Modules are named as in a Hugging Face checkpoint, so a state dict loads without renaming.

Shape letters, here and in the whole package:
    B batch, T tokens, C hidden_size, H query heads, K key/value heads, D head_dim,
    I intermediate_size, V vocab_size, R LoRA rank
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ModelConfig
from .device import to_device
from .fast import dropout, fused


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (arXiv 1910.07467). (..., C) in, the same out."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# ---- Rotary position embedding (arXiv 2104.09864) ----


def rotary_frequencies(config: ModelConfig, device=None) -> Tensor:
    """Radians per token of each rotated pair, (D/2,) float32, with the checkpoint's scaling applied."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling["rope_type"] == "linear":  # positions squeezed by one factor
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":  # slow pairs squeezed, fast ones kept, a ramp in between
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotary_tables(config: ModelConfig, T: int, device=None, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies with, each (T, D): [cos, cos] and [-sin, sin] of every position's D/2 angles."""
    positions = torch.arange(T, device=device).float()
    angles = torch.outer(positions, rotary_frequencies(config, device))  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) of every head by their position's angles; (B, T, heads, D) -> the same, tables (T, 1, D).

    A pair (a, b) becomes (a cos - b sin, b cos + a sin): each half times cos, plus the other half times -sin or sin.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


# ---- The one toggle ----


def attention_mask(
    padding_mask: Tensor | None, T: int, *, causal: bool, sliding_window: int | None = None, device=None
) -> Tensor | None:
    """Which keys each query may see: True = visible. All masks but the plain causal triangle, which is left to `attend`.

    Args:
        padding_mask: (B, T) bool, True = real token; None when nothing is padded.
        causal: True hides the keys to the right, False shows every real token.
        sliding_window: w; causal queries see the last w tokens (their own included), bidirectional ones w to each side.
    Returns:
        None where no mask is needed beside `causal`: all visible, or the plain triangle. Otherwise bool, broadcastable to
        (B, 1, T, T). Every query sees a key, so no softmax gives NaN: padding sees itself or (bidirectional, no window)
        the real tokens.
    """
    windowed = sliding_window is not None and T > sliding_window
    if padding_mask is None and not windowed:
        return None
    if not causal and not windowed:
        return padding_mask[:, None, None, :]  # (B, 1, 1, T): the same keys for every query

    position = torch.arange(T, device=device if padding_mask is None else padding_mask.device)
    ahead = position[None, :] - position[:, None]  # (T, T): how far the key lies to the right of the query
    visible = (ahead <= 0) if causal else torch.ones_like(ahead, dtype=torch.bool)
    if windowed:
        visible = visible & ((ahead > -sliding_window) if causal else (ahead.abs() <= sliding_window))
    visible = visible[None, None]  # (1, 1, T, T)
    if padding_mask is not None:
        visible = (visible & padding_mask[:, None, None, :]) | (ahead == 0)  # (B, 1, T, T); padding sees itself
    return visible


# ---- Attention, and the noise that SimCSE lives on ----


# on a CPU, bytes of a number (bfloat16, float32) -> tokens of the longest rows that are faster without torch's attention kernel
SHORT = {2: 256, 4: 128}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, with dropout of probability `dropout_p` on what the softmax gives.

    Args:
        q: (B, H, T, D); k, v: (B, K, T, D), each shared by H / K query heads.
        mask: bool, (B or 1, 1, T or 1, T), which decides alone; None: `causal` decides.
    Returns:
        (B, H, T, D)
    """
    (B, H, T, D), K = q.shape, k.shape[1]
    # where torch's CPU kernel is slow, with dropout or on short rows: written out below
    by_hand = q.device.type == "cpu" and (dropout_p > 0 or T <= SHORT.get(q.element_size(), 0))
    if not by_hand:
        # a GPU's fast kernels for masks, and for float32, want as many key heads as query heads
        if H != K and (mask is not None or q.is_cuda and q.dtype == torch.float32):
            k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        # a mask that is given already says which direction is visible
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal and mask is None, enable_gqa=k.shape[1] != H
        )
    if mask is None and causal:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
    # the H / K query heads of one key head are rows of one product
    scores = q.reshape(B, K, H // K * T, D) @ (k * D**-0.5).transpose(-1, -2)  # (B, K, H / K * T, T)
    if mask is not None:
        hiding = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        scores += hiding if hiding.shape[2] == 1 else hiding.repeat(1, 1, H // K, 1)  # added, it needs no backward pass
    probabilities = dropout(scores.softmax(dim=-1), dropout_p, True)
    return (probabilities @ v).view(B, H, T, D)


# ---- The decoder, bottom up ----


def pad(x: Tensor, real: Tensor, B: int, T: int) -> Tensor:
    """Puts real tokens back into padded rows, (N, ...) -> (B, T, ...), zeros at padding. real: (N,), their places among B * T."""
    padded = x.new_zeros(B * T, *x.shape[1:])
    padded[real] = x
    return padded.unflatten(0, (B, T))


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        H, K, D, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.H, self.K, self.D = H, K, D
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias and config.model_type != "qwen2")
        self.dropout = 0.0  # on the attention probabilities, in training only; SimCSE sets it

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool, real: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) in, the same out. Or, with `real` (N,), the N real tokens alone, (N, C): they go back into padded rows only
        for attention, the one place where the tokens of a row meet."""
        q = self.q_proj(x).unflatten(-1, (self.H, self.D))  # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (self.K, self.D))  # (B, T, K, D)
        v = self.v_proj(x).unflatten(-1, (self.K, self.D))  # (B, T, K, D)
        rope = [table.unsqueeze(-2) for table in rope]  # the same for all heads; rotated here, where memory is contiguous
        q, k = rotate(q, *rope), rotate(k, *rope)
        if real is not None:  # then there is a mask, (B, 1, 1 or T, T), which knows B and T
            q, k, v = (pad(x, real, mask.shape[0], mask.shape[-1]) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
        y = attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * D)
        if real is not None:
            y = y.flatten(0, 1).index_select(0, real)  # (N, H * D)
        return self.o_proj(y)


@fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element (arXiv 2002.05202)."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, I, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, I, bias=config.mlp_bias)
        self.down_proj = nn.Linear(I, C, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # (B, T, I) inside


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, causal: bool, real: Tensor | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, causal, real)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids in, hidden states out: transformers' LlamaModel / MistralModel / Qwen2Model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source = ""  # where its weights come from: for error messages, and for the base that a run names
        table = torch.empty(config.vocab_size, config.hidden_size)
        # nn.Embedding itself would draw on the meta device too, for which torch imports its compiler: seconds
        if not table.is_meta:
            nn.init.normal_(table)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.changes = 0  # of its weights since they were loaded: adapters merged, runs that trained them

    def forward(
        self, input_ids: Tensor, padding_mask: Tensor | None = None, *, causal: bool, all_layers: bool = False
    ) -> Tensor | list[Tensor]:
        """Hidden states after the last norm.

        Args:
            input_ids: (B, T) int64.
            padding_mask: (B, T) bool, True = real token; None: nothing is padded (it says nothing of the direction). Best kept
                on the CPU: its values are read here, and reading them from a GPU would wait for it.
            causal: the toggle. It has no default, so that no caller gets a direction by accident.
            all_layers: also return what enters each layer.
        Returns:
            (B, T, C), zeros at padding; with all_layers a list of num_hidden_layers + 1 such tensors, embeddings first.
            Rotary positions are relative, so the states of real tokens depend neither on the side of the padding
            nor on its amount, up to rounding (about 1 % in bfloat16, which rounds the rotary tables too).
        Raises:
            ValueError: a row without a real token.
        """
        (B, T), device, real = input_ids.shape, input_ids.device, None
        rope = rotary_tables(self.config, T, device, self.embed_tokens.weight.dtype)
        if padding_mask is not None:  # padding is left out of all but attention
            if not (has_token := padding_mask.any(dim=1)).all():
                raise ValueError(f"row {int(has_token.logical_not().nonzero()[0])} of the batch has no real token")
            real = to_device(padding_mask.flatten().nonzero().squeeze(1), device)  # (N,), places of the real tokens among B * T
            padding_mask = to_device(padding_mask, device)
            input_ids = input_ids.flatten().index_select(0, real)  # (N,)
            rope = tuple(table.index_select(0, real % T) for table in rope)  # (N, D)
        mask = attention_mask(padding_mask, T, causal=causal, sliding_window=self.config.sliding_window, device=device)
        x = self.embed_tokens(input_ids)  # (B, T, C), or (N, C)
        states = []
        for layer in self.layers:
            if all_layers:
                states.append(x)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rope, mask, causal, real, use_reentrant=False)
            else:
                x = layer(x, rope, mask, causal, real)
        states.append(self.norm(x))
        if real is not None:
            states = [pad(x, real, B, T) for x in states]
        return states if all_layers else states[0]


class LanguageModel(nn.Module):
    """A decoder with its output head: transformers' ...ForCausalLM."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, padding_mask: Tensor | None = None, *, causal: bool) -> Tensor:
        """Logits at every position, (B, T, V). Training calls `model` and `lm_head` separately, for fewer of them."""
        return self.lm_head(self.model(input_ids, padding_mask, causal=causal))


def init_weights(model: nn.Module, std: float = 0.02) -> None:
    """Fresh weights, as Llama is initialised: normal matrices, zero biases, unit norms."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


def set_attention_dropout(model: nn.Module, probability: float) -> None:
    """Dropout on the attention probabilities of every layer while training (SimCSE's noise)."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.dropout = probability
