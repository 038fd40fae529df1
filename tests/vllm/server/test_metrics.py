"""Counters as Prometheus reads them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from strict_skips import needs_vllm

ENGINE = {
    "engine": 1,
    "model": "base",
    "hits": [["sql", "base", 64]],
    "scheduled_rows": 42,
    "decoder_rows": 4,
    "loads": {"sql": 2},
    "swaps": {"sql": 1},
    "blocks_kept": 3,
    "load_buckets": [1, 1, *[0] * 9, 1],
    "load_seconds": 31.5,
}


@needs_vllm
def test_what_prometheus_reads() -> None:
    from icarus.vllm.server import metrics

    text = metrics.exposition([ENGINE, {**ENGINE, "engine": 2}]).decode()
    labels = 'engine="1",model_name="base"'
    assert f'icarus:prefix_hits_tokens_total{{{labels},reader="base",writer="sql"}} 64.0' in text
    assert f"icarus:decoder_rows_total{{{labels}}} 4.0" in text
    assert 'icarus:adapter_load_seconds_bucket{engine="1",le="0.025",model_name="base"} 2.0' in text
    assert f"icarus:adapter_load_seconds_count{{{labels}}} 3.0" in text
    assert 'icarus:decoder_rows_total{engine="2",model_name="base"} 4.0' in text


@needs_vllm
def test_two_scrapes_at_once_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from icarus.vllm.server import metrics

    calls = []

    async def call(*given: Any) -> list[dict[str, Any]]:
        calls.append(given)
        await asyncio.sleep(0)
        return [ENGINE]

    monkeypatch.setattr(metrics.cores, "call", call)
    client, scraper = SimpleNamespace(engine_core=None), metrics.Scraper()

    async def scrape() -> list[bytes]:
        return list(await asyncio.gather(scraper.text(client), scraper.text(client)))

    first, second = asyncio.run(scrape())
    assert first == second
    assert b"icarus:scheduled_rows" in first
    assert len(calls) == 1
    asyncio.run(scrape())
    assert len(calls) == 2
