"""On GPUs, a decode and its decoder row read the cache together, as in the paper (section 3), if the user asks for it.

Both are one query over the same blocks and the same length. Here they become one request with two queries, without a
causal mask: each sees all keys of the request, its own included. A kernel that takes several queries of a request at
once then reads its keys and values once.

    step      rows  b c d e b' d'    requests  b: 1  c: 1  d: 1  e: 1  b': 1  d': 1
    pairs     rows  b b' c d d' e    requests  b: 2  c: 1  d: 2  e: 1  b': 0  d': 0      without a mask

Neither the number of rows nor that of requests changes, nor where the step's lengths and block tables stand. So CUDA
graphs of decodes, which are captured with neither pairs nor decoder rows, serve steps with any of them: what differs is
in three buffers. A request with one query, which is the last of its keys, needs no mask either. Where a step has longer
requests, pairs stand behind the other rows and are attended in a call of their own, without a graph. (vLLM takes
causality by request as well, but not with FlashAttention 3; and Triton's kernel then reads all keys of a request for
every query of its prefill.)

In a sliding window the first query of a pair would see one key too many, so layers that have one keep two requests.

Each ``wrap_`` function takes a method of vLLM (vllm/v1/attention/backends/triton_attn.py and flash_attn.py) and returns
its replacement; see ledger.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadataBuilder

from icarus.vllm import attended_step, settings, step_layout
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.step_layout import Ints

logger = init_logger("vllm.icarus")

_NONE: Ints = np.zeros(0, dtype=np.int64)

_LONGEST = {TritonAttentionMetadataBuilder: 1, FlashAttentionMetadataBuilder: 2}
"""Queries of the longest request of a step of decodes, as kernels are told, by builder.

vLLM divides the keys of a request among programs of Triton's kernel if all requests have one query. Two are as well:
partial results are kept by row, and a step of decodes has no more rows than requests."""

_IMPLS = {TritonAttentionMetadataBuilder: TritonAttentionImpl, FlashAttentionMetadataBuilder: FlashAttentionImpl}
"""What uses the metadata of a builder. Classes that inherit from either do more, and are left alone."""


@dataclass(frozen=True)
class Paired:
    """How the rows of a step are attended."""

    order: Tensor  # (rows,): which row of the step each row is that the kernel gets
    back: Tensor  # (rows,): the inverse
    pairs: dict[str, Any] | None = None  # what differs in the metadata of the pairs' own call, if they have one


PAIRED = Attached[Paired]("paired")
"""On a step's attention metadata. None if it is vLLM's own."""


class _Buffers:
    """Where CUDA graphs find what differs between steps of decodes."""

    def __init__(self, builder: Any) -> None:
        config = builder.vllm_config
        room = max(config.scheduler_config.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0)
        self.order, self.back, self.starts = torch.zeros(3, room + 1, dtype=torch.int32, device=builder.device)
        self._written: tuple[Ints, Ints] = _NONE, _NONE

    def write(self, order: Ints, starts: Ints) -> None:
        """Copy to the device what has changed since the last step."""
        if not all(map(np.array_equal, (order, starts), self._written)):
            self._written = order, starts
            for values, buffer in ((order, self.order), (np.argsort(order), self.back), (starts, self.starts)):
                async_tensor_h2d(values, out=buffer[: len(values)])


_BUFFERS = Attached[_Buffers]("paired_buffers")
"""On a metadata builder."""

_OBSTACLE = Attached[str]("pairing_obstacle")
"""On a metadata builder: what ``obstacle`` says."""


# ------------------------------------------------------------------------------------------------- whether


def refusal(runner: Any) -> str:
    """Why no layer of a worker's model can read K/V once; empty if some can."""
    found = [obstacle(group.get_metadata_builder()) for groups in runner.attn_groups for group in groups]
    return f"cannot read K/V once: {found[0]}, or leave --read-kv-once out" if found and all(found) else ""


def obstacle(builder: Any) -> str:
    """Why the layers of a metadata builder keep two requests, and what to do about it; empty if they need not."""

    def find() -> str:
        count, found = len(builder.layer_names), _obstacle(builder)
        times = f"twice ({found})" if found else "once"
        logger.info("K/V of %d layers is read %s for a decode and its decoder row.", count, times)
        return found

    return _OBSTACLE.get_or_make(builder, find)


def _obstacle(builder: Any) -> str:
    config = builder.vllm_config
    compilation = config.compilation_config
    layers = [compilation.static_forward_context[name].impl for name in builder.layer_names]
    wanted = _IMPLS.get(type(builder))
    if wanted is None or any(type(layer) is not wanted for layer in layers):
        return "the attention backend is neither Triton's nor FlashAttention 3, set --attention-backend TRITON_ATTN"
    if wanted is FlashAttentionImpl and any(layer.vllm_flash_attn_version != 3 for layer in layers):
        version = layers[0].vllm_flash_attn_version
        return f"FlashAttention {version} is not prepared for it, set --attention-backend TRITON_ATTN"
    if any(layer.sliding_window != (-1, -1) for layer in layers):
        return "sliding windows need two requests, serve a base model with full attention"
    if any(layer.alibi_slopes is not None or layer.attn_type != AttentionType.DECODER for layer in layers):
        return "scores depend on more than queries and keys, serve a base model with rotary positions"
    if any(layer.kv_cache_dtype == "int4_per_token_head" for layer in layers):
        return "the kernel for an int4 cache is causal, change --kv-cache-dtype"
    if config.speculative_config is not None:
        return "drafts give a decode several rows, remove --speculative-config"
    if compilation.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
        return "CUDA graphs of steps with prefills are causal, set cudagraph_mode to FULL_AND_PIECEWISE"
    return ""


# ------------------------------------------------------------------------------------------------- metadata


def wrap_build(original: Original) -> Original:
    """``build`` of either metadata builder: finds the pairs of a step."""

    @wraps(original)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        common, rows = common_attn_metadata, attended_step.decoder_rows()
        # vLLM 0.31.0 attends a prefix that all requests share in a call of its own, and the rest always causally.
        if common_prefix_len or not settings.reads_kv_once(self.vllm_config) or obstacle(self):
            return original(self, common_prefix_len, common, *args, **kwargs)
        starts = common.query_start_loc_cpu.numpy()
        first, second = step_layout.pairs(starts, rows) if rows else (_NONE, _NONE)
        graphs = self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        if common.max_query_len == 1 and (len(first) or graphs):
            common, paired = _decodes(self, common, *step_layout.side_by_side(starts, first, second))
        elif len(first):
            common, paired = _mixed(self, common, *step_layout.apart(starts, first, second))
        else:
            return original(self, common_prefix_len, common, *args, **kwargs)
        metadata = original(self, common_prefix_len, common, *args, **kwargs)
        PAIRED.set(metadata, paired)
        return metadata

    return build


def _decodes(builder: Any, common: Any, order: Ints, starts: Ints) -> tuple[Any, Paired]:
    """A step of decodes, for one call without a mask.

    Args:
        builder: vLLM's metadata builder.
        common: the step's ``CommonAttentionMetadata``.
        order: as in ``step_layout.side_by_side``.
        starts: likewise.
    """
    buffers, count = _BUFFERS.get_or_make(builder, lambda: _Buffers(builder)), common.num_actual_tokens
    buffers.write(np.concatenate([order, np.arange(len(order), count)]), starts)  # padding stays where it is
    changed = replace(
        common,
        query_start_loc=buffers.starts[: len(starts)],
        query_start_loc_cpu=torch.from_numpy(starts.astype(np.int32)),
        max_query_len=_LONGEST[type(builder)],
        causal=False,
    )
    return changed, Paired(buffers.order[:count], buffers.back[:count])


def _mixed(builder: Any, common: Any, order: Ints, others: Ints, pairs: Ints) -> tuple[Any, Paired]:
    """A step with longer requests, for a call with the other rows and one with the pairs.

    Args:
        builder: vLLM's metadata builder.
        common: the step's ``CommonAttentionMetadata``.
        order: as in ``step_layout.apart``.
        others: ``starts`` of the requests without a pair.
        pairs: ``starts`` of those with one.
    """
    order = np.concatenate([order, np.arange(len(order), common.num_actual_tokens)])
    on_device = [
        async_tensor_h2d(values, device=builder.device, dtype=torch.int32)
        for values in (order, np.argsort(order), others, pairs)
    ]
    changed = replace(
        common,
        num_actual_tokens=int(others[-1]),
        query_start_loc=on_device[2],
        query_start_loc_cpu=torch.from_numpy(others.astype(np.int32)),
    )
    differences = {
        "num_actual_tokens": int(pairs[-1]),
        "query_start_loc": on_device[3],
        "max_query_len": _LONGEST[type(builder)],
        "causal": False,
        "scheduler_metadata": None,  # the kernel makes it
    }
    return changed, Paired(on_device[0], on_device[1], differences)


# ------------------------------------------------------------------------------------------------- attention


def wrap_forward(original: Original) -> Original:
    """``forward`` of either backend: brings rows into the order of the metadata, and results back."""

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
        paired = None if attn_metadata is None else PAIRED.get(attn_metadata)
        if paired is None:
            return original(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        sorted_query = _bytes(query).index_select(0, paired.order).view(query.dtype)
        attended = torch.empty_like(output[: len(paired.order)])
        original(self, layer, sorted_query, key, value, kv_cache, attn_metadata, attended, *args, **kwargs)
        if paired.pairs:
            count, metadata = attn_metadata.num_actual_tokens, replace(attn_metadata, **paired.pairs)
            original(
                self, layer, sorted_query[count:], key, value, kv_cache, metadata, attended[count:], *args, **kwargs
            )
        torch.index_select(_bytes(attended), 0, paired.back, out=_bytes(output[: len(paired.back)]))
        return output

    return forward


def _bytes(rows: Tensor) -> Tensor:
    """Rows that can be selected on any device, which those of eight-bit floats cannot."""
    return rows.view(torch.uint8) if rows.itemsize == 1 else rows
