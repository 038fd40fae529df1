"""The equations of docs/method.md, literally and slowly, for Llama and Qwen3: plain tensors in, plain tensors out.

They know nothing of Transformers, of PEFT, or of the code under test. One sequence, no cache, a row of both streams for
every position. ``weights`` is a state dict; ``lora`` maps a projection's name to (A, B, s) with dW = s B A.

``loss_everywhere`` is the other reference: the code under test, with a decoder row for every position in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from icarus.streams import IGNORED, Batch, EncoderCache, TwoStreams

Weights = dict[str, Tensor]
Lora = dict[str, tuple[Tensor, Tensor, float]]


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    theta: float
    eps: float


@dataclass(frozen=True)
class Result:
    logits: Tensor  # (T, V) of the stream with the adapter
    base: Tensor  # (T, V) of the base model
    kv: list[tuple[Tensor, Tensor]]  # per layer, (KV heads, T, head size) each


def two_streams(weights: Weights, lora: Lora, tokens: Tensor, shape: Shape) -> Result:
    """ICaRus: K/V from the encoder stream alone, logits from the decoder stream."""
    encoder = decoder = weights["model.embed_tokens.weight"][tokens]
    cached = []
    for layer in range(shape.layers):
        block = _Block(weights, layer, shape)
        k, v = block.keys_values(encoder, {})
        cached.append((k, v))
        encoder = block.rest(encoder, k, v, {})
        decoder = block.rest(decoder, k, v, lora)
    return Result(_logits(weights, decoder, shape), _logits(weights, encoder, shape), cached)


def one_stream(weights: Weights, lora: Lora, tokens: Tensor, shape: Shape) -> Result:
    """Ordinary LoRA (the base model without ``lora``): the adapted hidden state writes the next layer's K/V."""
    hidden = weights["model.embed_tokens.weight"][tokens]
    cached = []
    for layer in range(shape.layers):
        block = _Block(weights, layer, shape)
        cached.append(block.keys_values(hidden, lora))
        hidden = block.rest(hidden, *cached[-1], lora)
    logits = _logits(weights, hidden, shape)
    return Result(logits, logits, cached)


class _Block:
    def __init__(self, weights: Weights, layer: int, shape: Shape) -> None:
        self.weights, self.prefix, self.shape = weights, f"model.layers.{layer}.", shape

    def keys_values(self, hidden: Tensor, lora: Lora) -> tuple[Tensor, Tensor]:
        x = self._norm("input_layernorm", hidden)
        k = self._heads("self_attn.k_proj", x, lora, "self_attn.k_norm")
        return _rope(k, self.shape.theta), self._heads("self_attn.v_proj", x, lora)

    def rest(self, hidden: Tensor, k: Tensor, v: Tensor, lora: Lora) -> Tensor:
        x = self._norm("input_layernorm", hidden)
        q = _rope(self._heads("self_attn.q_proj", x, lora, "self_attn.q_norm"), self.shape.theta)
        attended = []
        for head in range(self.shape.heads):
            group = head * self.shape.kv_heads // self.shape.heads
            scores = q[head] @ k[group].T * self.shape.head_size**-0.5
            later = torch.ones_like(scores).triu(1).bool()
            attended.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[group])
        hidden = hidden + self._linear("self_attn.o_proj", torch.cat(attended, -1), lora)
        x = self._norm("post_attention_layernorm", hidden)
        gate, up = self._linear("mlp.gate_proj", x, lora), self._linear("mlp.up_proj", x, lora)
        return hidden + self._linear("mlp.down_proj", gate * gate.sigmoid() * up, lora)

    def _linear(self, name: str, x: Tensor, lora: Lora) -> Tensor:
        name = self.prefix + name
        y = x @ self.weights[name + ".weight"].T
        if name in lora:
            down, up, scale = lora[name]
            y = y + scale * (x @ down.T @ up.T)
        return y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return _rms(x, self.weights[self.prefix + name + ".weight"], self.shape.eps)

    def _heads(self, name: str, x: Tensor, lora: Lora, norm: str = "") -> Tensor:
        y = self._linear(name, x, lora).unflatten(-1, (-1, self.shape.head_size)).transpose(0, 1)
        return self._norm(norm, y) if norm and f"{self.prefix}{norm}.weight" in self.weights else y


def _logits(weights: Weights, hidden: Tensor, shape: Shape) -> Tensor:
    return _rms(hidden, weights["model.norm.weight"], shape.eps) @ weights["lm_head.weight"].T


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rope(x: Tensor, theta: float) -> Tensor:
    """Dimension i and i + D/2 turn together by the angle position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def loss_everywhere(streams: TwoStreams, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What ``TwoStreams.loss`` returns, from decoder rows at all positions, of which those with loss are picked."""
    cache = EncoderCache()
    streams.encode(batch.input_ids, cache, batch=batch)
    rows, targets = batch.rows_with_loss()
    every = torch.arange(batch.input_ids.shape[1], device=rows.device).expand_as(batch.input_ids)
    logits = streams._decode(batch.input_ids, cache, batch.position_ids, streams._masks(batch, every))
    logits = logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1]))
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, logits, targets
