"""The least time that a step can take on this machine: what it must read, and what it must multiply.

Read are the weights of all layers and of the head once per step, the weights of the adapters in the batch, and K/V of
each request once. Multiplied are rows with weights, and queries with keys and values. Both are divided by what the
machine was measured to do; the larger one is the bound. Everything above it is the engine's: launching operators,
scheduling, copies, and operators that do not reach the machine's speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from icarus.bench import measure


@dataclass(frozen=True)
class Machine:
    """What all threads together can do."""

    read_bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measured(cls, dtype: str) -> Machine:
        """By a matrix-vector product over 512 MB, and by a product of two matrices of ``dtype``."""
        return cls(measure.read_bandwidth(), matrix_speed(getattr(torch, dtype)))


def matrix_speed(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations per second of a square matrix product, best of 5."""
    one, other = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(one, other)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


@dataclass(frozen=True)
class Shape:
    """What a base model's step reads and multiplies; counts of numbers, not bytes."""

    layer_weights: int
    head_weights: int
    kv_per_token: int  # K and V of all layers
    queries: int  # width of a query, all heads and layers together
    bytes_per_number: int

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Of a loaded causal LM of Transformers."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head = model.get_output_embeddings()
        outside = {id(w): w for part in (model.get_input_embeddings(), head) for w in part.parameters()}
        return cls(
            layer_weights=sum(w.numel() for w in model.parameters()) - sum(w.numel() for w in outside.values()),
            head_weights=head.weight.numel(),
            kv_per_token=2 * config.num_hidden_layers * kv_heads * width,
            queries=config.num_hidden_layers * heads * width,
            bytes_per_number=model.dtype.itemsize,
        )


@dataclass(frozen=True)
class Work:
    """One kind of step, and how many of them."""

    rows: int  # through the layers, decoder rows included
    sampled: int  # through the head
    context: int  # tokens of K/V that there are, all requests together; each is read once
    pairs: int  # of a query and a key
    adapted: int = 0  # rows that an adapter is applied to
    adapters: int = 0  # different ones
    adapter_weights: int = 0  # of one
    times: int = 1


def bound(machine: Machine, shape: Shape, works: Iterable[Work]) -> dict[str, Any]:
    """Milliseconds that all the work takes at least, by reading and by arithmetic, and which of the two costs more.

    The bound is that of step after step, so where steps differ in what bounds them it is more than either sum.
    """
    read = arithmetic = least = 0.0
    for work in works:
        numbers = shape.layer_weights + shape.head_weights + work.adapters * work.adapter_weights
        numbers += work.context * shape.kv_per_token
        products = work.rows * shape.layer_weights + work.sampled * shape.head_weights
        products += work.adapted * work.adapter_weights + 2 * work.pairs * shape.queries
        reading = work.times * numbers * shape.bytes_per_number / machine.read_bytes_per_s
        multiplying = work.times * 2 * products / machine.flops_per_s
        read, arithmetic, least = read + reading, arithmetic + multiplying, least + max(reading, multiplying)
    return {
        "reading_ms": round(1e3 * read, 3),
        "arithmetic_ms": round(1e3 * arithmetic, 3),
        "bound_ms": round(1e3 * least, 3),
        "by": "reading" if read > arithmetic else "arithmetic",
    }
