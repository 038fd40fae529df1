"""Prefix hits by writer and reader, loads, and how all counters are read out. Needs no vLLM."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from icarus.vllm import counters
from icarus.vllm.engine import counting
from icarus.vllm.engine.ranks import REFUSALS, Refusals


def blocks(*ids: int) -> list[Any]:
    return [SimpleNamespace(block_id=number, is_null=not number) for number in ids]


def manager(*groups: list[Any]) -> Any:
    pool = SimpleNamespace()
    counting.WRITERS.set(pool, {1: "sql", 2: None})
    return SimpleNamespace(
        block_pool=pool,
        coordinator=SimpleNamespace(get_blocks=lambda request_id: groups),
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16)) for _ in groups]
        ),
        prefix_cache_lookup_enabled=lambda request: True,
    )


def request(lora: str | None, preemptions: int = 0) -> Any:
    named = None if lora is None else SimpleNamespace(lora_name=lora)
    return SimpleNamespace(lora_request=named, request_id="r", num_preemptions=preemptions)


def test_hits_are_counted_by_writer_and_reader() -> None:
    count = counting.wrap_record_prefix_cache_stats(lambda self, request, num_hits: None)
    cache = manager(blocks(1, 2, 1, 3))
    count(cache, request("chat"), 48)
    count(cache, request(None), 16)
    count(cache, request("chat", preemptions=1), 48)
    count(cache, request("chat"), 0)
    assert counting.HITS.get(cache) == Counter({("sql", "chat"): 32, (None, "chat"): 16, ("sql", None): 16})


def test_the_group_with_most_blocks_tells() -> None:
    cache = manager(blocks(0, 0, 1), blocks(2, 2, 2))
    counting.wrap_record_prefix_cache_stats(lambda self, request, num_hits: None)(cache, request("chat"), 48)
    assert counting.HITS.get(cache) == Counter({(None, "chat"): 48})


def test_the_writer_is_whose_request_filled_the_block() -> None:
    write, pool = counting.wrap_cache_full_blocks(lambda *args: None), SimpleNamespace()
    write(pool, request("sql"), blocks(5, 6, 7), 1, 3, 16, 0)
    write(pool, request(None), blocks(5, 6, 7), 0, 1, 16, 0)
    write(pool, request("chat"), blocks(5, 6, 7), 3, 3, 16, 0)
    assert counting.WRITERS.get(pool) == {6: "sql", 7: "sql", 5: None}


def test_loads_and_swaps() -> None:
    core = SimpleNamespace(
        scheduler=SimpleNamespace(
            kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(cached_block_hash_to_block=[1, 2, 3]))
        ),
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(served_model_name="base"),
            parallel_config=SimpleNamespace(data_parallel_index=1),
        ),
        model_executor=SimpleNamespace(collective_rpc=lambda method: [method(worker), method(worker)]),
    )
    worker = SimpleNamespace(model_runner=SimpleNamespace())
    for name, number, shares, seconds in (
        ("a", 1, True, 0.02),
        ("b", 2, False, 99),
        ("a", 1, True, 0.3),
        ("b", 2, False, 0),
    ):
        counting.count_load(core, SimpleNamespace(lora_name=name, lora_int_id=number), seconds, shares=shares)
    counters.count_rows(worker.model_runner, 40, 2)
    counters.count_rows(worker.model_runner, 2, 2)
    told = counting.read(core)
    assert told["loads"] == {"a": 2, "b": 2}
    assert told["swaps"] == {"a": 1, "b": 1}
    assert told["blocks_kept"] == 3, "of the adapter that shares"
    assert (told["scheduled_rows"], told["decoder_rows"]) == (42, 4)
    assert told["load_buckets"] == [1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert told["engine"] == 1
    REFUSALS.set(core, Refusals(adapters="rank 1 has none of our code"))
    core.model_executor.collective_rpc = lambda method: pytest.fail("it cannot even unpickle this")
    assert counting.read(core)["scheduled_rows"] == 0
