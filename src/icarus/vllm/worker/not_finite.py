"""Blocks of the KV cache that hold NaN or infinity, which are cleaned before somebody else gets them.

A block that is freed keeps what was written. Whoever gets it next writes its first slots and attends to those alone,
but attention kernels compute over whole blocks, and a masked slot counts 0 times its value: 0 x NaN is NaN. So one
adapter (or prompt of embeddings) that turns NaN would spoil the answers of everybody who gets its blocks.

A row whose V is not finite in some layer has a last hidden state that is not finite either, since a row attends to
itself. (K alone may be infinite where a row then gives itself no weight; kernels put something else in the place of a
masked score, so K that others left changes nothing.) So the hidden states of all rows of a step tell which blocks have
to be cleaned when they are handed out again, of prompts that are cut into chunks and of requests that end before they
sample as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from icarus.vllm.marks import decoded_ids
from icarus.vllm.state import Attached
from icarus.vllm.step_layout import Ints

logger = init_logger("vllm.icarus.not_finite")

_BASE = "The base model"


@dataclass
class _Watch:
    """What one worker knows of its blocks."""

    blocks: set[int] = field(default_factory=set)
    pending: list[_Rows] = field(default_factory=list)  # of steps that the device may still be in
    named: set[str] = field(default_factory=set)  # who has been reported


@dataclass(frozen=True)
class _Rows:
    """Rows of one step: which are not finite, where they write, and for whom."""

    spoiled: Tensor
    slots: list[tuple[Tensor, int]]  # by group of layers: slot of each row, and the size of a block
    lora_ids: Ints
    names: dict[int, str]
    done: Any  # an event of the device; None where there is nothing to wait for


_WATCH = Attached[_Watch]("not_finite")
"""On a model runner."""


def clean(runner: Any, scheduler_output: Any) -> None:
    """Before a step: clean the blocks that it is the first to get, if they need it."""
    watch = _WATCH.get(runner)
    if watch is None or not (watch.pending or watch.blocks):
        return
    fresh = set(_fresh_blocks(runner, scheduler_output))
    _settle(watch, wait=bool(fresh))
    if spoiled := sorted(watch.blocks & fresh):
        _zero(runner, spoiled)
        watch.blocks.difference_update(spoiled)


class Step(Protocol):
    """What has to be known of a step, by either model runner; asked for only where it is needed."""

    @property
    def count(self) -> int:
        """Rows, decoder rows included."""

    @property
    def takes_embeddings(self) -> bool:
        """Whether clients may send embeddings, or media that become embeddings."""

    def requests(self) -> dict[int, LoRARequest]:
        """LoRA requests of the step, or of more, by LoRA id."""

    def lora_ids(self) -> Ints:
        """Of each row."""

    def slots(self) -> Iterable[tuple[Tensor, int]]:
        """For each group of layers the slots of the step's rows, or of more, and the size of a block."""


def note(runner: Any, hidden: Any, step: Step) -> None:
    """After a forward pass: note the blocks of rows that are not finite.

    On CPUs a step pays for one sum. Elsewhere nothing waits for the device, and steps are looked at that have a
    conventional adapter, or embeddings of clients: base weights alone are what the user chose.

    Args:
        runner: vLLM's model runner.
        hidden: what the pass returned.
        step: which it was.
    """
    count = step.count
    states = [state[:count] for state in _states(hidden)]
    on_host = states[0].device.type == "cpu"
    if on_host:
        # In float32 bfloat16 takes eight times as long. A sum of float16 may overflow, and rows tell.
        if all(math.isfinite(state.sum().item()) for state in states):
            return
    elif not _can_spoil(step):
        return
    spoiled = torch.stack([~state.sum(-1, dtype=torch.float32).isfinite() for state in states]).any(0)
    watch = _WATCH.get_or_make(runner, _Watch)
    names = {lora_id: f"Adapter {request.lora_name!r}" for lora_id, request in step.requests().items()}
    slots = [(_on_host(slots[:count]), size) for slots, size in step.slots()]
    done = None if on_host else torch.Event(spoiled.device)
    watch.pending.append(_Rows(_on_host(spoiled), slots, step.lora_ids(), names, done))
    if done is not None:
        done.record()
    else:
        _settle(watch, wait=True)


def _can_spoil(step: Step) -> bool:
    """Whether a step has rows that others than the base weights can turn NaN before they write."""
    requests = step.requests()
    conventional = len(requests) > len(decoded_ids(requests))
    return conventional or step.takes_embeddings


def _states(hidden: Any) -> Iterator[Tensor]:
    """Of the last rank of a pipeline, of its other ranks, and with auxiliary states for a draft model."""
    if isinstance(hidden, Tensor):
        yield hidden
    elif tensors := getattr(hidden, "tensors", None):
        yield from tensors.values()
    else:
        yield hidden[0]


def _on_host(values: Tensor) -> Tensor:
    """There when the device has done its work; a copy in any case, since buffers of the step are written again."""
    return values.clone() if values.device.type == "cpu" else values.to("cpu", non_blocking=True)


def _settle(watch: _Watch, *, wait: bool) -> None:
    """Take over what the device has found out; all of it, if somebody waits for it."""
    pending, watch.pending = watch.pending, []
    for rows in pending:
        if rows.done is not None and not rows.done.query():
            if not wait:
                watch.pending.append(rows)
                continue
            rows.done.synchronize()
        if not rows.spoiled.any():
            continue
        spoiled = rows.spoiled.numpy()
        for slots, size in rows.slots:
            written = slots.numpy()[spoiled]
            watch.blocks.update((written[written >= 0] // size).tolist())
        for lora_id in np.unique(rows.lora_ids[spoiled]).tolist():
            _report(watch, rows.names.get(lora_id, _BASE))


def _report(watch: _Watch, name: str) -> None:
    if name not in watch.named:
        watch.named.add(name)
        logger.warning(
            "%s computed values that are not finite, so its answers mean nothing; the cache of others is kept clean. "
            "Replace it, or serve with --dtype float32.",
            name,
        )


def _fresh_blocks(runner: Any, scheduler_output: Any) -> Iterator[int]:
    """Blocks that a step hands out anew, without those that were found in the prefix cache."""
    sizes = [group.kv_cache_spec.block_size for group in runner.kv_cache_config.kv_cache_groups]
    for request in scheduler_output.scheduled_new_reqs:
        yield from _behind(request.block_ids, sizes, request.num_computed_tokens)
    cached = scheduler_output.scheduled_cached_reqs
    for name, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        if blocks is not None:
            yield from _behind(blocks, sizes, computed if name in cached.resumed_req_ids else 0)


def _behind(groups: Iterable[list[int]], sizes: list[int], tokens: int) -> Iterator[int]:
    """Block ids but for those of the first ``tokens``."""
    for blocks, size in zip(groups, sizes, strict=False):
        yield from blocks[-(-tokens // size) :]


def _zero(runner: Any, blocks: list[int]) -> None:
    if runner.device.type != "cpu":
        if _zeroer(runner) is None:  # vLLM makes it for models with recurrent layers alone
            runner._init_kv_zero_meta()
        _zeroer(runner).zero_block_ids(blocks)
        return
    # As in vLLM's CPUModelRunner._zero_block_ids, which leaves sliding windows out.
    index = torch.tensor(blocks)
    layers = runner.compilation_config.static_forward_context.values()
    caches = [cache for layer in layers if isinstance(cache := getattr(layer, "kv_cache", None), Tensor)]
    for cache in {cache.data_ptr(): cache for cache in caches if cache.numel()}.values():
        cache.index_fill_(0, index, 0)


def _zeroer(runner: Any) -> Any:
    """What sets blocks to zero; None until it has been made."""
    return getattr(runner, "kv_block_zeroer", None) or getattr(runner, "_kv_block_zeroer", None)  # V2, V1
