"""Workflows against an OpenAI-compatible server: they arrive when they are told to, and wait for their own calls.

Prompts go out as token ids, and the ids that a call generated are put into later prompts as they came back, so that
what was generated is found in the prefix cache too. ``return_token_ids`` is vLLM's (protocol.py of its completions).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from icarus.bench.agents.records import CallRecord, Traffic
from icarus.bench.agents.workloads import Workflow
from icarus.errors import IcarusError

SAMPLE_SECONDS = 1.0
"""Time between two readings of ``/metrics``."""

SILENCE_SECONDS = 900.0
"""How long a stream may be silent: longer than any queue that a run makes."""


COUNTERS = {
    "prompt_tokens_prefilled": ("vllm:prompt_tokens_by_source_total", "local_compute"),
    "cached_tokens": ("vllm:prompt_tokens_by_source_total", "local_cache_hit"),
    "preemptions": ("vllm:num_preemptions_total", ""),
}
"""Name and source of what vLLM has counted since its start."""

KV_USAGE = ("vllm:kv_cache_usage_perc", "")
"""Share of KV blocks in use, 0 to 1; blocks that only wait to be found again count as free."""


class CallFailed(IcarusError):
    """The server did not answer a call as it should."""


_NO_ANSWER = (aiohttp.ClientError, OSError, TimeoutError)


def drive(url: str, workflows: Sequence[Workflow], arrivals: Sequence[float], models: Sequence[str]) -> Traffic:
    """Run all workflows; role r is asked of ``models[r % len(models)]``.

    Raises:
        CallFailed: as soon as a call fails; the others are cancelled.
    """
    try:
        return asyncio.run(_Load(url, models).run(workflows, arrivals))
    except (*_NO_ANSWER, BaseExceptionGroup) as error:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        if isinstance(first, _NO_ANSWER):
            raise CallFailed(f"The server does not answer ({first!r}).") from first
        raise first from None


class _Load:
    """One run."""

    def __init__(self, url: str, models: Sequence[str]) -> None:
        self._url, self._models = url, models
        self._session: aiohttp.ClientSession
        self._records: list[CallRecord] = []
        self._metrics: list[tuple[float, str]] = []  # the first before any call, the last after all
        self._started = time.perf_counter()

    async def run(self, workflows: Sequence[Workflow], arrivals: Sequence[float]) -> Traffic:
        connector = aiohttp.TCPConnector(limit=0)  # no queue on our side
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_SECONDS)
        async with aiohttp.ClientSession(self._url, connector=connector, timeout=timeout) as self._session:
            await self._read_metrics()
            self._started = time.perf_counter()
            sampler = asyncio.create_task(self._sample())
            try:
                async with asyncio.TaskGroup() as group:
                    numbered = enumerate(zip(workflows, arrivals, strict=True))
                    tasks = [group.create_task(self._workflow(n, w, arrival)) for n, (w, arrival) in numbered]
                duration = self._now()
            finally:
                sampler.cancel()
            await self._read_metrics()
        arrived, took = zip(*(task.result() for task in tasks), strict=True)
        readings = [(at, totals(text)) for at, text in self._metrics]
        (_, before), (_, after) = readings[0], readings[-1]
        return Traffic(
            duration=duration,
            arrivals=arrived,
            workflows=took,
            calls=sorted(self._records, key=lambda record: (record.workflow, record.call)),
            kv_usage=[(round(at, 2), round(reading[KV_USAGE], 4)) for at, reading in readings],
            **{name: int(after[key] - before[key]) for name, key in COUNTERS.items()},
        )

    def _now(self) -> float:
        return time.perf_counter() - self._started

    async def _workflow(self, number: int, workflow: Workflow, arrival: float) -> tuple[float, float]:
        """Gives when it arrived and how long it took."""
        await asyncio.sleep(arrival - self._now())
        arrived = self._now()
        outputs: list[asyncio.Task[list[int]]] = []
        async with asyncio.TaskGroup() as group:
            for index in range(len(workflow.calls)):
                outputs.append(group.create_task(self._call(number, workflow, index, outputs)))
        return arrived, self._now() - arrived

    async def _call(
        self, number: int, workflow: Workflow, index: int, outputs: Sequence[asyncio.Task[list[int]]]
    ) -> list[int]:
        """Waits for the calls before it, and gives the ids that it generated."""
        call = workflow.calls[index]
        for earlier in sorted(call.waits_for):
            await outputs[earlier]
        prompt = workflow.prompt(index, lambda earlier: outputs[earlier].result())
        record = CallRecord(number, index, self._models[call.role % len(self._models)], self._now(), len(prompt))
        try:
            generated = await self._ask(record, prompt, call.output_tokens)
        except (ValueError, KeyError) as error:
            raise CallFailed(f"A call of {record.model} got no stream of completions ({error!r}).") from error
        if len(generated) != call.output_tokens:
            raise CallFailed(f"{record.model} returned {len(generated)} tokens instead of {call.output_tokens}.")
        self._records.append(record)
        return generated

    async def _ask(self, record: CallRecord, prompt: list[int], length: int) -> list[int]:
        request = {
            "model": record.model,
            "prompt": prompt,
            "max_tokens": length,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        generated: list[int] = []
        last = began = time.perf_counter()
        async with self._session.post("/v1/completions", json=request) as response:
            if response.status != 200:
                raise CallFailed(f"{record.model} answered {response.status}: {(await response.text())[:500]}")
            async for event in _events(response.content.iter_any()):
                if "error" in event:
                    raise CallFailed(f"{record.model} answered an error: {event['error']}")
                tokens = [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
                if tokens:
                    now = time.perf_counter()
                    if generated:
                        record.itls.append(round(now - last, 6))
                    else:
                        record.ttft = now - began
                    last = now
                    generated += tokens
                if usage := event.get("usage"):
                    record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        record.latency, record.output_tokens = last - began, len(generated)
        return generated

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            with suppress(*_NO_ANSWER):  # a call that fails says what is wrong
                await self._read_metrics()

    async def _read_metrics(self) -> None:
        async with self._session.get("/metrics") as response:
            self._metrics.append((self._now(), await response.text()))


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """JSON objects of a stream of server-sent events, up to [DONE]."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n\n")
        for message in whole:
            data = message.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if data:
                yield json.loads(data)


def totals(metrics: str) -> dict[tuple[str, str], float]:
    """Of the text of ``/metrics``, engines together: values by name and source.

    Raises:
        CallFailed: what we read is not in it.
    """
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            key = sample.name, sample.labels.get("source", "")
            values[key] = values.get(key, 0.0) + sample.value
    if missing := {*COUNTERS.values(), KV_USAGE} - values.keys():
        raise CallFailed(
            f"The server's /metrics has no {' '.join(min(missing)).strip()}; serve with vLLM 0.31 or 0.32."
        )
    return values
