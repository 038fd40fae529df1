"""On CPUs, a decode and its decoder row read the cache together, as in the paper (section 3).

Both are one query over the same blocks and the same length. As two requests they are computed far apart. Here they
become one request with twice the query heads: the heads of one KV head lie side by side, those of the scheduled row
first. If the kernel takes so many heads at once, keys and values are read once for both rows; if it takes fewer, they
come from a core's cache the second time.

    rows    x: heads 0 1 | 2 3      x': heads 0' 1' | 2' 3'     two KV heads, two query heads for each
    pair    0 1 0' 1' | 2 3 2' 3'

The kernel computes each query head independently of its neighbours. So a scheduled row has the very bits that it has
in a step without decoder rows, as long as the kernel splits a request's keys in the same way, or not at all. It splits
them when threads would have nothing to do.

Each ``wrap_`` function takes a method of vLLM (vllm/v1/attention/backends/cpu_attn.py) and returns its replacement; see
ledger.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs

from icarus.vllm import attended_step, step_layout
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.step_layout import Ints

MIN_PAIRED_KEYS = 1536
"""Keys of all pairs of a step from which one pass costs less than two. Two passes read them twice, but move no heads.

Measured with both sides alternating in one engine: SmolLM2-135M, bfloat16, two cores (docs/log.md)."""

_MAX_HEADS = {"amx": 16}
"""Query heads of one KV head that csrc/cpu/cpu_attn_impl.hpp takes at most when it splits keys, by instruction set."""

_MAX_HEADS_ELSE = 8
"""The same for other instruction sets, which would compute more of them one by one."""


@dataclass(frozen=True)
class Pairs:
    """Those decodes of a step that have a decoder row. A group is the query heads of one KV head in one row."""

    metadata: Any  # vLLM's, for a step with one request per pair
    order: Tensor  # (2 pairs x KV heads,): which of the step's groups the pairs consist of, as drawn above
    back: Tensor | None  # (2 pairs x KV heads,): the inverse of order; None if the step has other rows, too


PAIRS = Attached[Pairs]("pairs")
"""On a step's attention metadata: its pairs, if they are computed together."""

_PLAIN = Attached[bool]("plain")
"""On a metadata builder: what ``_is_plain`` says."""


def wrap_build(original: Original) -> Original:
    """``CPUAttentionMetadataBuilder.build``: finds the pairs. In vLLM's own pass they are requests with one key."""

    @wraps(original)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        rows, common = attended_step.decoder_rows(), common_attn_metadata
        if rows is None or not _is_plain(self):
            return original(self, common_prefix_len, common, *args, **kwargs)
        first, second = step_layout.pairs(common.query_start_loc.numpy(), rows)
        lengths = common.seq_lens[first]
        read = lengths if self.window_size < 0 else lengths.clamp(max=self.window_size)
        if not len(first) or int(read.sum()) < MIN_PAIRED_KEYS:
            return original(self, common_prefix_len, common, *args, **kwargs)
        rest = common.seq_lens.clone()
        rest[first] = rest[second] = 1
        metadata = original(self, common_prefix_len, replace(common, seq_lens=rest), *args, **kwargs)
        PAIRS.set(metadata, _pairs_of(self, common, metadata, lengths, first, second))
        return metadata

    return build


def _is_plain(builder: Any) -> bool:
    """Whether query heads differ in nothing but their values, and the kernel takes twice as many of them."""

    def check() -> bool:
        context = builder.vllm_config.compilation_config.static_forward_context
        layers = [context[name].impl for name in builder.layer_names]
        return (
            2 * builder.num_heads // builder.num_kv_heads <= _MAX_HEADS.get(builder.isa, _MAX_HEADS_ELSE)
            and not (builder.is_cross_attention or builder.is_encoder_only_attention)
            and all(layer.alibi_slopes is None and layer.sinks is None for layer in layers)
        )

    return _PLAIN.get_or_make(builder, check)


def _pairs_of(builder: Any, common: Any, metadata: Any, lengths: Tensor, first: Ints, second: Ints) -> Pairs:
    """The pairs of a step.

    Args:
        builder: vLLM's metadata builder.
        common: the step's ``CommonAttentionMetadata``.
        metadata: what vLLM built from it.
        lengths: (pairs,), context length of each pair.
        first: (pairs,), requests with the scheduled rows.
        second: (pairs,), requests with the decoder rows.
    """
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
    rows = common.query_start_loc.numpy()
    paired = replace(
        metadata,
        num_actual_tokens=len(first),
        max_query_len=1,
        causal=True,  # as in the schedule: each query is the last of its request
        dynamic_causal=None,
        query_start_loc=starts,
        seq_lens=lengths,
        block_table=common.block_table_tensor[first],
        scheduler_metadata=schedule,
    )
    order = _order(rows[first], rows[second], builder.num_kv_heads)
    only_pairs = 2 * len(first) == common.num_actual_tokens
    return Pairs(paired, torch.from_numpy(order), torch.from_numpy(np.argsort(order)) if only_pairs else None)


def _order(scheduled: Ints, decoder: Ints, kv_heads: int) -> Ints:
    """(2 pairs x KV heads,): the groups of these rows, ordered as drawn above. numpy takes a third of torch's time."""
    rows = np.stack((scheduled, decoder), axis=1, dtype=np.int64)
    return (rows[:, None, :] * kv_heads + np.arange(kv_heads)[:, None]).reshape(-1)


def wrap_forward(original: Original) -> Original:
    """``CPUAttentionBackendImpl.forward``: vLLM's pass for the other rows, then one for the pairs."""

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
        step_pairs = PAIRS.get(attn_metadata)
        if step_pairs is None or step_pairs.back is None:
            original(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if step_pairs is not None:
            paired = _pair(query, step_pairs, self.num_kv_heads)
            attended = torch.empty_like(paired)
            original(self, layer, paired, key, value, kv_cache, step_pairs.metadata, attended, *args, **kwargs)
            _unpair(attended, step_pairs, output)
        return output

    return forward


def _pair(query: Tensor, pairs: Pairs, kv_heads: int) -> Tensor:
    """(rows, heads, head size) to (pairs, 2 heads, head size)."""
    rows, heads, size = query.shape
    groups = query.view(rows, kv_heads, -1)
    if query.is_contiguous():
        picked = groups.flatten(0, 1).index_select(0, pairs.order)
    else:  # part of a projection: flattening would copy all rows
        picked = groups[pairs.order // kv_heads, pairs.order % kv_heads]
    return picked.view(-1, 2 * heads, size)


def _unpair(attended: Tensor, pairs: Pairs, output: Tensor) -> None:
    """The way back, into (rows, heads, head size)."""
    groups = attended.view(len(pairs.order), -1)
    target = output.view(-1, groups.shape[1])
    if pairs.back is None:
        target.index_copy_(0, pairs.order, groups)
    else:  # in a third of the time; the rows behind them are padding
        torch.index_select(groups, 0, pairs.back, out=target[: len(groups)])
