"""What the plugin cannot serve yet, and how much room decoder rows need in the engine's buffers.

A refusal says why, and which flag or variable to change. It stops an ICaRus adapter from being loaded, but never the
engine: base models and conventional adapters run wherever vLLM runs them. Configurations are read by attribute; nothing
here imports vLLM, so the checks are tested without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from icarus.vllm.cpu import lora_rows

SHAREABLE_CACHES = {"FullAttentionSpec", "SlidingWindowSpec"}
"""Kinds of KV cache (classes in vllm/v1/kv_cache_interface.py) whose blocks hold plain K and V by position."""

_LAYER_EMBEDDING_MODELS = {"Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"}
"""Architectures with ``per_layer_embeddings`` (vllm/model_executor/models/gemma4_mm.py), which decoder rows lack."""

MAX_SCORED_ROWS = 256
"""Rows of scored prompts (``prompt_logprobs``) in one step; each of them needs a decoder row."""

Limit = tuple[Callable[[Any], Any], str]
"""Whether a ``VllmConfig`` has the limit, and what to say then."""

_LIMITS: tuple[Limit, ...] = (
    (
        # torch_ops/lora_ops.py indexes the slots with -1 for rows without an adapter.
        lambda c: c.device_config.device_type == "cpu" and not lora_rows.wanted(),
        "vLLM's own CPU operators give rows without an adapter the weights of the last slot, and these rows write the "
        f"shared cache: unset {lora_rows.SWITCH_VARIABLE}",
    ),
    (
        lambda c: c.device_config.device_type == "cpu" and not lora_rows.available(),
        "vLLM's own CPU operators give rows without an adapter the weights of the last slot, and ICaRus's own could "
        "not be compiled: install g++, or see the reason in the engine's log",
    ),
    (
        lambda c: c.device_config.device_type == "cpu" and c.lora_config.fully_sharded_loras,
        "fully sharded layers keep vLLM's own CPU operators, which give rows without an adapter the weights of the "
        "last slot: remove --fully-sharded-loras",
    ),
    (
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "decoder rows are not passed between pipeline stages: set --pipeline-parallel-size 1, and use tensor or data "
        "parallelism",
    ),
    (
        lambda c: c.parallel_config.use_ubatching,
        "micro-batches would separate decoder rows from the rows whose K/V they read: remove --enable-dbo and "
        "--ubatch-size",
    ),
    (
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        "context parallelism splits the cache of a request: set --decode-context-parallel-size 1",
    ),
    (
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        "context parallelism splits the rows of a request: set --prefill-context-parallel-size 1",
    ),
    (
        # v1/worker/gpu/sample/batch_shard.py finds the rows that it samples by the scheduled lengths.
        lambda c: c.parallel_config.enable_batch_sharded_sampling,
        "sharded sampling reads the rows that were scheduled, and not decoder rows: remove "
        "--enable-batch-sharded-sampling",
    ),
    (
        lambda c: c.speculative_config is not None and c.speculative_config.method != "ngram",
        "draft models read hidden states or a cache of their own, which is untested with decoder rows: remove "
        "--speculative-config, or set its method to ngram",
    ),
    (
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "fast prefill skips rows that decoder rows repeat: remove --kv-sharing-fast-prefill",
    ),
    (
        lambda c: c.lora_config.enable_tower_connector_lora,
        "LoRA on a vision tower changes what is cached: remove --enable-tower-connector-lora",
    ),
    (
        lambda c: c.model_config.runner_type != "generate",
        "pooling reads all rows, and only sampled rows have decoder rows: set --runner generate",
    ),
    (
        # v1/attention/backends/rocm_aiter_fa.py and turboquant: new prompts attend to K/V of the batch.
        lambda c: torch.version.hip is not None,
        "some of ROCm's attention backends read K and V from the batch instead of the cache, and decoder rows have "
        "none there: serve on NVIDIA GPUs or CPUs",
    ),
    (
        lambda c: "turboquant" in str(c.cache_config.cache_dtype),
        "TurboQuant's attention reads K and V from the batch instead of the cache, and decoder rows have none there: "
        "change --kv-cache-dtype",
    ),
    (
        lambda c: c.model_config.is_encoder_decoder,
        "an encoder-decoder model has a second cache: serve a decoder-only base model",
    ),
    (
        lambda c: c.model_config.use_mla,
        "MLA caches a projection instead of K and V, which is untested with decoder rows: serve a base model that "
        "caches K and V",
    ),
    (
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
        "recurrent layers keep one state per request, which decoder rows would overwrite: serve a base model whose "
        "layers are all attention",
    ),
    (
        lambda c: c.model_config.is_mm_prefix_lm,
        "attention within an image looks ahead, and vLLM keeps the images' ranges per request: serve a causal base "
        "model",
    ),
    (
        lambda c: _LAYER_EMBEDDING_MODELS & set(c.model_config.architectures),
        "this model passes its layers embeddings that it keeps per scheduled row: serve another base model",
    ),
    (
        lambda c: c.model_config.rswa_window is not None,
        "vLLM keeps reference sliding windows per request: serve a base model without them",
    ),
)


def refusal(config: Any) -> str:
    """Why ICaRus adapters cannot be served with this ``VllmConfig``; empty if they can."""
    return next((reason for holds, reason in _LIMITS if holds(config)), "")


def room_refusal(scheduler: Any) -> str:
    """Why decoder rows do not fit with this ``SchedulerConfig``; empty after ``reserve_room``."""
    if scheduler.max_num_active_seqs is None:
        return (
            "this engine's buffers have no room for decoder rows: start it again with the plugin and with --enable-lora"
        )
    return ""


def cache_refusal(specs: Iterable[object]) -> str:
    """Why adapters cannot share a cache of these ``KVCacheSpec`` objects; empty if they can."""
    kinds = {type(part).__name__ for spec in specs for part in getattr(spec, "kv_cache_specs", {"": spec}).values()}
    if others := sorted(kinds - SHAREABLE_CACHES):
        return f"this model keeps a cache of kind {others[0]}: serve a base model with plain attention in all layers"
    return ""


def reserve_room(scheduler: Any, sampled: int = 1) -> None:
    """Have a ``SchedulerConfig`` size buffers for decoder rows while it schedules no more than before.

    ``max_num_seqs`` and ``max_num_batched_tokens`` size everything in the workers, LoRA buffers and CUDA graphs
    included; ``max_num_active_seqs`` and ``max_num_scheduled_tokens`` limit what is scheduled (vllm/config/
    scheduler.py:55-75). Calling it again changes nothing.

    Args:
        scheduler: the configuration, which is changed.
        sampled: decoder rows that a running request may need; scored prompts need ``MAX_SCORED_ROWS`` on top.
    """
    active = scheduler.max_num_active_seqs or scheduler.max_num_seqs
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    scheduler.max_num_active_seqs, scheduler.max_num_scheduled_tokens = active, budget
    scheduler.max_num_seqs = max(scheduler.max_num_seqs, 2 * active)
    room = max(budget + sampled * active + MAX_SCORED_ROWS, scheduler.max_num_seqs)
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, room)


def cover_graphs(compilation: Any, active: int, ceiling: int) -> None:
    """Have CUDA graphs cover a step in which every request decodes for a specialist.

    vLLM captures steps of up to ``ceiling`` rows, whatever the number of requests, and a larger step runs without a
    graph. With decoder rows that is half as many requests, so as many as before are covered again. What the user set
    stays. Calling it again changes nothing.

    Args:
        compilation: the ``CompilationConfig``, which is changed.
        active: requests that may run.
        ceiling: vLLM's own for this device (vllm/config/vllm.py, ``_set_cudagraph_sizes``).
    """
    rows = 2 * min(active, ceiling)
    if (
        compilation.max_cudagraph_capture_size is None
        and compilation.cudagraph_capture_sizes is None
        and rows > ceiling
    ):
        compilation.max_cudagraph_capture_size = rows
