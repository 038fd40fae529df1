"""What a decoder row costs in a decode step, computed from a model's sizes and a device's data sheet.

A step reads every weight once and the keys and values of every request, and multiplies each weight by each row. On a
GPU that is bound by whichever takes longer, memory or arithmetic: the weights' part by either, the cache's part by
memory (in a decode there are few query heads for each key). A decoder row adds a row to the former, and to the latter
another pass over the request's cache; or none, if both rows read it together. This is the least that a step can take:
kernels reach part of a data sheet's figures, and launches, sampling and the adapters' own weights are left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device, by its data sheet."""

    name: str
    bandwidth: float  # of memory, bytes a second
    arithmetic: float  # multiplications and additions of dense matrices a second, in the type of the weights
    memory: float  # bytes


@dataclass(frozen=True)
class Model:
    """A base model, by its sizes."""

    name: str
    parameters: float
    multiplied: float  # parameters that every row is multiplied by: all but the table of embeddings
    cache: float  # bytes of keys and values for one token
    width: float = 2.0  # bytes of a parameter


H100 = Device("H100 SXM, 80 GB", bandwidth=3.35e12, arithmetic=989e12, memory=80e9)
"""NVIDIA's data sheet; arithmetic is bfloat16 without sparsity."""

LLAMA_3_1_8B = Model(
    "Llama-3.1-8B", parameters=8.03e9, multiplied=8.03e9 - 128_256 * 4096, cache=2 * 32 * 8 * 128 * 2.0
)
"""Of its config.json: 32 layers, 8 heads of 128 for keys and values, 128,256 tokens, width 4,096; bfloat16."""


def step_seconds(model: Model, device: Device, requests: int, context: int, rows: int = 1, passes: int = 1) -> float:
    """The least time of a decode step.

    Args:
        model: the base model.
        device: that has all of it.
        requests: in the step.
        context: tokens in the cache of each.
        rows: of each request.
        passes: over the cache of each request.
    """
    read = model.multiplied * model.width / device.bandwidth
    multiplied = 2 * model.multiplied * requests * rows / device.arithmetic
    return max(read, multiplied) + passes * requests * context * model.cache / device.bandwidth


def added(model: Model, device: Device, requests: int, context: int, *, paired: bool) -> float:
    """The part that decoder rows add to a step in which every request has one; 0.5 is half as much again.

    ``paired``: whether both rows of a request read the cache in one pass.
    """
    stock = step_seconds(model, device, requests, context)
    return step_seconds(model, device, requests, context, rows=2, passes=1 if paired else 2) / stock - 1


def fits(model: Model, device: Device, requests: int, context: int) -> bool:
    """Whether weights and caches are within 90 % of the device's memory, which is what vLLM takes by default."""
    return model.parameters * model.width + requests * context * model.cache <= 0.9 * device.memory
