"""On CPUs a decode and its decoder row read the cache together, as the decoder in the paper does (section 3).

Both are one query over the same blocks and the same length. As two requests they are computed far apart; here they
become one request with twice the query heads: the heads that share a head of the cache lie side by side, those of the
scheduled row first. Where the kernel takes such heads together (their number divides what it takes at once) keys and
values are read once for both rows, else from a core's cache the second time.

    rows    x: heads 0 1 | 2 3      x': heads 0' 1' | 2' 3'     two heads of the cache, two query heads for each
    pair    0 1 0' 1' | 2 3 2' 3'

The kernel computes a query head without looking at its neighbours. So a scheduled row has the very bits that it has in
a step without decoder rows, as long as the kernel divides the keys of a request alike, or not at all: it divides them
where threads would have nothing to do.

Each function below takes a method of vLLM (vllm/v1/attention/backends/cpu_attn.py) and gives the one that stands in for
it; see ledger.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs

from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.step_layout import DecoderRows, Ints, pairs

MIN_PAIRED_KEYS = 1536
"""Keys of all pairs of a step from which on one pass costs less than two, which read them twice but move no heads:
some 1,500, where sides alternated in one engine (SmolLM2-135M, bfloat16, two cores; docs/log.md)."""

_MAX_SPLIT_HEADS = {"amx": 16}
"""Query heads of one head of the cache that vLLM's csrc/cpu/cpu_attn_impl.hpp takes at most where it divides keys.

Others take 8 (``vec``): twice as many would be computed one by one."""

_step: ContextVar[DecoderRows | None] = ContextVar("icarus_step", default=None)


@contextmanager
def step(rows: DecoderRows | None) -> Iterator[None]:
    """Attention metadata that is built within is of a step with these decoder rows."""
    token = _step.set(rows)
    try:
        yield
    finally:
        _step.reset(token)


@dataclass(frozen=True)
class Pairs:
    """The decodes of a step with a decoder row each."""

    metadata: Any  # vLLM's, of a step with one request for each pair
    order: Tensor  # (2 pairs x heads of the cache,): which groups of the step's query heads a pair is made of, as drawn
    back: Tensor | None  # its inverse, the same shape; None if the step has other rows too


PAIRS = Attached[Pairs]("pairs")
"""On a step's attention metadata: its pairs, where they are computed together."""

_PLAIN = Attached[bool]("plain")
"""On a metadata builder: what ``_is_plain`` says."""


def wrap_build(original: Original) -> Original:
    """``CPUAttentionMetadataBuilder.build``: finds the pairs; for stock's pass they are requests of one key."""

    @wraps(original)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        rows, common = _step.get(), common_attn_metadata
        if rows is None or not _is_plain(self):
            return original(self, common_prefix_len, common, *args, **kwargs)
        first, second = pairs(common.query_start_loc.numpy(), rows)
        lengths = common.seq_lens[first]
        read = lengths if self.window_size < 0 else lengths.clamp(max=self.window_size)
        if not len(first) or int(read.sum()) < MIN_PAIRED_KEYS:
            return original(self, common_prefix_len, common, *args, **kwargs)
        rest = common.seq_lens.clone()
        rest[first] = rest[second] = 1
        metadata = original(self, common_prefix_len, replace(common, seq_lens=rest), *args, **kwargs)
        PAIRS.set(metadata, _bring_together(self, common, metadata, lengths, first, second))
        return metadata

    return build


def _is_plain(builder: Any) -> bool:
    """Whether query heads differ in nothing but their values, and the kernel takes twice as many."""

    def look() -> bool:
        context = builder.vllm_config.compilation_config.static_forward_context
        layers = [context[name].impl for name in builder.layer_names]
        return (
            2 * builder.num_heads // builder.num_kv_heads <= _MAX_SPLIT_HEADS.get(builder.isa, 8)
            and not (builder.is_cross_attention or builder.is_encoder_only_attention)
            and all(layer.alibi_slopes is None and layer.sinks is None for layer in layers)
        )

    return _PLAIN.get_or_make(builder, look)


def _bring_together(builder: Any, common: Any, metadata: Any, lengths: Tensor, first: Ints, second: Ints) -> Pairs:
    starts = torch.arange(len(first) + 1, dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(first),
        num_heads=2 * builder.num_heads,
        num_kv_heads=builder.num_kv_heads,
        head_dim=builder.head_dim,
        seq_lens=lengths,
        dtype=builder.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=builder.window_size,
        isa=builder.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        dynamic_causal=None,
        kv_cache_dtype=builder.kv_cache_dtype,
    )
    here = common.query_start_loc.numpy()
    together = replace(
        metadata,
        num_actual_tokens=len(first),
        max_query_len=1,
        causal=True,  # as in the schedule: each of them is the last of its request
        dynamic_causal=None,
        query_start_loc=starts,
        seq_lens=lengths,
        block_table=common.block_table_tensor[first],
        scheduler_metadata=schedule,
    )
    order = _order(here[first], here[second], builder.num_kv_heads)
    alone = 2 * len(first) == common.num_actual_tokens
    return Pairs(together, torch.from_numpy(order), torch.from_numpy(np.argsort(order)) if alone else None)


def _order(scheduled: Ints, decoder: Ints, kv_heads: int) -> Ints:
    """The groups of query heads of these rows, pairs as drawn above; in numpy, a third of torch's time for so few."""
    rows = np.stack((scheduled, decoder), axis=1, dtype=np.int64)
    return (rows[:, None, :] * kv_heads + np.arange(kv_heads)[:, None]).reshape(-1)


def wrap_forward(original: Original) -> Original:
    """``CPUAttentionBackendImpl.forward``: stock's pass for the other rows, then one for the pairs."""

    @wraps(original)
    def forward(
        self: Any,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        found = PAIRS.get(attn_metadata)
        if found is None or found.back is None:
            original(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if found is not None:
            together = _together(query, found, self.num_kv_heads)
            attended = torch.empty_like(together)
            original(self, layer, together, key, value, kv_cache, found.metadata, attended, *args, **kwargs)
            _apart(attended, found, output)
        return output

    return forward


def _together(query: Tensor, found: Pairs, kv_heads: int) -> Tensor:
    """(rows, heads, head size) to (pairs, 2 heads, head size)."""
    rows, heads, size = query.shape
    groups = query.view(rows, kv_heads, -1)
    if query.is_contiguous():
        picked = groups.flatten(0, 1).index_select(0, found.order)
    else:  # part of a projection: flattening would copy all rows
        picked = groups[found.order // kv_heads, found.order % kv_heads]
    return picked.view(-1, 2 * heads, size)


def _apart(attended: Tensor, found: Pairs, output: Tensor) -> None:
    """The way back, into (rows, heads, head size)."""
    groups = attended.view(len(found.order), -1)
    into = output.view(-1, groups.shape[1])
    if found.back is None:
        into.index_copy_(0, found.order, groups)
    else:  # in a third of the time; rows behind them are padding
        torch.index_select(groups, 0, found.back, out=into[: len(groups)])
