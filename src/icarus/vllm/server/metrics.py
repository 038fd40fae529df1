"""The counters of all engines as Prometheus metrics, beside vLLM's own.

When the front end is scraped it asks the engines, over the sockets that it has. Nothing here imports vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from icarus.vllm.counters import LOAD_SECONDS_BUCKETS, READ_COUNTERS
from icarus.vllm.server import cores

SCRAPE_TIMEOUT_S = 2.0
"""How long a scrape waits for engines in a long step; after that it returns what they answered last."""

Engines = list[dict[str, Any]]
"""What ``engine.counting.read`` returned in each engine."""


class Scraper:
    """Asks the engines, one call at a time."""

    def __init__(self) -> None:
        self._last: Engines = []
        self._call: asyncio.Task[Engines] | None = None

    async def text(self, client: Any) -> bytes:
        """The counters of all engines, in Prometheus' text format; ``client`` is vLLM's ``AsyncLLM``."""
        call = self._call = self._call or asyncio.ensure_future(cores.call(client.engine_core, READ_COUNTERS))
        done, _ = await asyncio.wait([call], timeout=SCRAPE_TIMEOUT_S)
        if done:
            if self._call is call:  # the first of those that waited for it
                self._call = None
            if not call.cancelled() and call.exception() is None:
                self._last = call.result()
        return exposition(self._last)


def exposition(engines: Engines) -> bytes:
    """Counters in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(engines))
    text: bytes = generate_latest(registry)
    return text


class _Snapshot:
    """A collector of ``prometheus_client``."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Any]:
        labels = ["model_name", "engine"]
        hits = CounterMetricFamily(
            "icarus:prefix_hits_tokens",
            "Prompt tokens found in the prefix cache, by the model whose request wrote them and the model that read.",
            labels=[*labels, "writer", "reader"],
        )
        scheduled = CounterMetricFamily(
            "icarus:scheduled_rows", "Rows that vLLM scheduled, of all models.", labels=labels
        )
        decoder = CounterMetricFamily(
            "icarus:decoder_rows", "Decoder rows that were added to steps for ICaRus adapters.", labels=labels
        )
        loads = CounterMetricFamily("icarus:adapter_loads", "Adapters loaded.", labels=[*labels, "adapter"])
        swaps = CounterMetricFamily(
            "icarus:adapter_swaps", "Loads that replaced an adapter under its name.", labels=[*labels, "adapter"]
        )
        kept = CounterMetricFamily(
            "icarus:cache_blocks_kept_on_swap",
            "Blocks that were in the prefix cache when an ICaRus adapter was replaced, and stayed valid.",
            labels=labels,
        )
        seconds = HistogramMetricFamily(
            "icarus:adapter_load_seconds", "Time to verify and load an adapter.", labels=labels
        )
        for engine in self._engines:
            of = [engine["model"], str(engine["engine"])]
            for writer, reader, tokens in engine["hits"]:
                hits.add_metric([*of, writer, reader], tokens)
            scheduled.add_metric(of, engine["scheduled_rows"])
            decoder.add_metric(of, engine["decoder_rows"])
            for name, count in engine["loads"].items():
                loads.add_metric([*of, name], count)
            for name, count in engine["swaps"].items():
                swaps.add_metric([*of, name], count)
            kept.add_metric(of, engine["blocks_kept"])
            bounds = [*map(str, LOAD_SECONDS_BUCKETS), "+Inf"]
            buckets = list(zip(bounds, accumulate(engine["load_buckets"]), strict=True))
            seconds.add_metric(of, buckets, engine["load_seconds"])
        yield from (hits, scheduled, decoder, loads, swaps, kept, seconds)
