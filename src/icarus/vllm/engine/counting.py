"""Counting in the engine core: prefix hits by writer and reader, loads, and reading all counters.

A cached block costs one entry of a dictionary. ``read`` returns all counters as plain data, which vLLM can send to the
front end (server/metrics.py).

Nothing here imports vLLM.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from functools import wraps
from typing import Any

from icarus.vllm.counters import LOAD_SECONDS_BUCKETS, Hits, Loads, Model, rows_of
from icarus.vllm.engine.ranks import REFUSALS
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached

WRITERS = Attached[dict[int, Model]]("writers")
"""On a block pool: the model whose request wrote a block, by the block's id."""

HITS = Attached[Hits]("hits")
"""On a cache manager."""

LOADS = Attached[Loads]("loads")
"""On an engine core."""


# ------------------------------------------------------------------------------------------------- prefix cache


def model_of(request: Any) -> Model:
    """The model that a scheduled request is for."""
    return request.lora_request.lora_name if request.lora_request else None


def wrap_cache_full_blocks(original: Original) -> Original:
    """``BlockPool.cache_full_blocks``: notes who wrote a block."""

    @wraps(original)
    def cache_full_blocks(
        self: Any, request: Any, blocks: Any, num_cached_blocks: int, num_full_blocks: int, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(self, request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs)
        if num_cached_blocks < num_full_blocks:
            writers, model = WRITERS.get_or_make(self, dict), model_of(request)
            for block in blocks[num_cached_blocks:num_full_blocks]:
                writers[block.block_id] = model
        return result

    return cache_full_blocks


def wrap_record_prefix_cache_stats(original: Original) -> Original:
    """``KVCacheManager.record_prefix_cache_stats``: counts hits by writer and reader where vLLM counts hits.

    vLLM calls it once for each scheduled request, when its blocks are allocated. As in vLLM's own counter, what a
    preempted request finds again of its own is not a hit.
    """

    @wraps(original)
    def record_prefix_cache_stats(self: Any, request: Any, num_hits: int) -> Any:
        if num_hits and not request.num_preemptions and self.prefix_cache_lookup_enabled(request):
            writers = WRITERS.get(self.block_pool) or {}
            groups = self.coordinator.get_blocks(request.request_id)
            sizes = [group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups]
            HITS.get_or_make(self, Counter).update(_hits(groups, sizes, writers, model_of(request), num_hits))
        return original(self, request, num_hits)

    return record_prefix_cache_stats


def _hits(groups: Any, sizes: list[int], writers: dict[int, Model], reader: Model, tokens: int) -> Hits:
    """Tokens by writer and reader, from the group of layers that has the most blocks.

    Layers with a sliding window keep null blocks outside of it, which have no writer.
    """
    most: Hits = Counter()
    for blocks, size in zip(groups, sizes, strict=True):
        read = [block.block_id for block in blocks[: tokens // size] if not block.is_null]
        if len(read) * size > most.total():
            most = Counter()
            for block_id in read:
                most[writers.get(block_id), reader] += size
    return most


# ------------------------------------------------------------------------------------------------- loads


def count_load(core: Any, request: Any, seconds: float, *, shares: bool) -> None:
    """Count a load. If the adapter's id is known, it replaced another adapter.

    Args:
        core: the engine core.
        request: the ``LoRARequest`` that was loaded.
        seconds: that the load took, verification included.
        shares: whether the adapter shares the cache.
    """
    loads = LOADS.get_or_make(core, Loads)
    swapped = request.lora_int_id in loads.ids
    loads.ids.add(request.lora_int_id)
    loads.loads[request.lora_name] += 1
    loads.buckets[bisect_left(LOAD_SECONDS_BUCKETS, seconds)] += 1
    loads.seconds += seconds
    if swapped:
        loads.swaps[request.lora_name] += 1
        if shares:
            loads.kept += len(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)


# ------------------------------------------------------------------------------------------------- reading


def read(core: Any) -> dict[str, Any]:
    """All counters of one engine, in types that vLLM sends between processes as they are."""
    config, loads = core.vllm_config, LOADS.get_or_make(core, Loads)
    base: str = config.model_config.served_model_name
    hits = HITS.get(core.scheduler.kv_cache_manager) or Counter()
    refusals = REFUSALS.get(core)
    if refusals and refusals.adapters:  # a worker that lacks our code would answer with an error (ranks.py)
        scheduled = decoder = 0
    else:
        scheduled, decoder = core.model_executor.collective_rpc(rows_of)[0]
    return {
        "engine": config.parallel_config.data_parallel_index,
        "model": base,
        "hits": [[writer or base, reader or base, tokens] for (writer, reader), tokens in hits.items()],
        "scheduled_rows": scheduled,
        "decoder_rows": decoder,
        "loads": dict(loads.loads),
        "swaps": dict(loads.swaps),
        "blocks_kept": loads.kept,
        "load_buckets": loads.buckets,
        "load_seconds": loads.seconds,
    }
