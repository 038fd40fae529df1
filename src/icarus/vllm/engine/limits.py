"""What the plugin cannot serve yet, and how much room decoder rows need in the engine's buffers.

Nothing here imports vLLM: configurations are read by attribute, so that the checks are tested without it. A refusal
says why, and which flag or variable to change. It stops an ICaRus adapter from being loaded, never the engine: base
models and conventional adapters run wherever stock vLLM runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from icarus.vllm.cpu import lora_rows

SHAREABLE_CACHES = {"FullAttentionSpec", "SlidingWindowSpec"}
"""Kinds of KV cache (classes of vllm/v1/kv_cache_interface.py) whose blocks hold plain K and V by position."""

_LAYER_EMBEDDING_MODELS = {"Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"}
"""Architectures with ``per_layer_embeddings`` (vllm/model_executor/models/gemma4_mm.py), which decoder rows lack."""

MAX_SCORED_ROWS = 256
"""Rows of prompts that are scored (``prompt_logprobs``) in one step: each needs a decoder row."""

Limit = tuple[Callable[[Any], Any], str]

_LIMITS: tuple[Limit, ...] = (
    (
        lambda c: c.use_v2_model_runner,
        "decoder rows are built for model runner V1: set VLLM_USE_V2_MODEL_RUNNER=0",
    ),
    (
        # torch_ops/lora_ops.py indexes with the slot -1 of rows without an adapter.
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
        "last slot: take out --fully-sharded-loras",
    ),
    (
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "decoder rows are not passed between pipeline stages: set --pipeline-parallel-size 1, and use tensor or data "
        "parallelism",
    ),
    (
        lambda c: c.parallel_config.use_ubatching,
        "micro-batches would part decoder rows from the rows whose K/V they read: take out --enable-dbo and "
        "--ubatch-size",
    ),
    (
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        "context parallelism splits the cache of one request: set --decode-context-parallel-size 1",
    ),
    (
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        "context parallelism splits the rows of one request: set --prefill-context-parallel-size 1",
    ),
    (
        lambda c: c.speculative_config is not None and c.speculative_config.method != "ngram",
        "a draft model reads hidden states or a cache of its own, which no test here covers: take out "
        "--speculative-config, or set its method to ngram",
    ),
    (
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "fast prefill skips rows that decoder rows double: take out --kv-sharing-fast-prefill",
    ),
    (
        lambda c: c.lora_config.enable_tower_connector_lora,
        "LoRA on a vision tower changes what is cached: take out --enable-tower-connector-lora",
    ),
    (
        lambda c: c.model_config.runner_type != "generate",
        "pooling reads every row and not the sampled ones: set --runner generate",
    ),
    (
        # v1/attention/backends/rocm_aiter_fa.py and turboquant: fresh prompts attend to K/V of the batch.
        lambda c: torch.version.hip is not None,
        "some of ROCm's attention backends read K and V of the batch and not of the cache, which decoder rows are not "
        "in: serve on NVIDIA GPUs or CPUs",
    ),
    (
        lambda c: "turboquant" in str(c.cache_config.cache_dtype),
        "this cache's attention reads K and V of the batch, which decoder rows are not in: change --kv-cache-dtype",
    ),
    (
        lambda c: c.model_config.is_encoder_decoder,
        "an encoder-decoder model has a second cache: serve a decoder-only base model",
    ),
    (
        lambda c: c.model_config.use_mla,
        "MLA caches a projection that no test here covers: serve a base model with K and V in its cache",
    ),
    (
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
        "recurrent layers keep one state per request, which decoder rows would overwrite: serve a base model whose "
        "layers are all attention",
    ),
    (
        lambda c: c.model_config.is_mm_prefix_lm,
        "attention within an image looks ahead, and its ranges are kept per request: serve a causal base model",
    ),
    (
        lambda c: _LAYER_EMBEDDING_MODELS & set(c.model_config.architectures),
        "this model hands its layers embeddings that it keeps by scheduled row: serve another base model",
    ),
    (
        lambda c: c.model_config.rswa_window is not None,
        "reference sliding windows are kept per request: serve a base model without them",
    ),
)


def refusal(config: Any) -> str:
    """Why ICaRus adapters cannot be served with this ``VllmConfig``; empty where they can."""
    return next((reason for holds, reason in _LIMITS if holds(config)), "")


def room_refusal(scheduler: Any) -> str:
    """Why decoder rows do not fit this ``SchedulerConfig``; empty where ``reserve_room`` saw to it."""
    if scheduler.max_num_active_seqs is None:
        return (
            "this engine's buffers were sized without decoder rows: set VLLM_USE_V2_MODEL_RUNNER=0 and start it again"
        )
    return ""


def cache_refusal(specs: Iterable[object]) -> str:
    """Why adapters cannot share a cache of these ``KVCacheSpec`` objects; empty where they can."""
    kinds = {type(part).__name__ for spec in specs for part in getattr(spec, "kv_cache_specs", {"": spec}).values()}
    if odd := sorted(kinds - SHAREABLE_CACHES):
        return f"this model keeps a cache of kind {odd[0]}: serve a base model with plain attention in all layers"
    return ""


def reserve_room(scheduler: Any, sampled: int = 1) -> None:
    """Make a ``SchedulerConfig`` size buffers for decoder rows while it schedules no more than before.

    ``max_num_seqs`` and ``max_num_batched_tokens`` size everything in the workers, the LoRA buffers and CUDA graphs
    included; ``max_num_active_seqs`` and ``max_num_scheduled_tokens`` bound what is scheduled (vllm/config/
    scheduler.py:55-75). Every running request may need a decoder request with ``sampled`` rows, and scored prompts up
    to ``MAX_SCORED_ROWS`` rows together. Calling it again changes nothing.
    """
    active = scheduler.max_num_active_seqs or scheduler.max_num_seqs
    budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    scheduler.max_num_active_seqs, scheduler.max_num_scheduled_tokens = active, budget
    scheduler.max_num_seqs = max(scheduler.max_num_seqs, 2 * active)
    room = max(budget + sampled * active + MAX_SCORED_ROWS, scheduler.max_num_seqs)
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, room)
