"""A beam search says what its prompt found in the cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from icarus.vllm.server.beam_search import wrap_beam_search


class Engine:
    """Finds more in the cache with every request, as the steps of a search do."""

    def __init__(self, first: int) -> None:
        self.found, self.name = first, "engine"

    async def generate(self, prompt: str, **options: Any) -> AsyncIterator[Any]:
        self.found += 16
        yield SimpleNamespace(num_cached_tokens=self.found - 16, text=prompt)


class Serving:
    def __init__(self, engine: Engine) -> None:
        self.engine_client, self.renderer = engine, "renderer"

    @wrap_beam_search
    async def beam_search(self, prompt: str, steps: int) -> AsyncIterator[Any]:
        """As vLLM's: one request a step, and an output of its own making."""
        assert self.renderer == "renderer"
        assert self.engine_client.name == "engine"
        for _ in range(steps):
            async for output in self.engine_client.generate(prompt, trace_headers=None):
                assert output.text == prompt
                await asyncio.sleep(0)
        yield SimpleNamespace(num_cached_tokens=None, prompt=prompt)


def search(*firsts: int, steps: int = 3) -> list[Any]:
    """What searches say that run at once, each on an engine of its own state."""

    async def one(first: int) -> Any:
        return [output async for output in Serving(Engine(first)).beam_search("hello", steps)]

    async def all_of_them() -> Any:
        return await asyncio.gather(*map(one, firsts))

    return [output.num_cached_tokens for [output] in asyncio.run(all_of_them())]


def test_it_is_what_the_first_step_found() -> None:
    assert search(64, 0) == [64, 0]


def test_a_search_without_a_step_says_nothing() -> None:
    assert search(64, steps=0) == [None]
