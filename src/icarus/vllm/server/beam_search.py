"""Beam search in the front end: vLLM makes many short requests of it, and drops what the first found in the cache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import wraps
from typing import Any

from icarus.vllm.patching import Original


def wrap_beam_search(original: Original) -> Original:
    """``BeamSearchOnlineMixin.beam_search``: its answers have ``num_cached_tokens``, from which vLLM makes usage."""

    @wraps(original)
    async def beam_search(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        search = _Search(self)
        async for output in original(search, *args, **kwargs):
            output.num_cached_tokens = search.cached_tokens
            yield output

    return beam_search


class _Search:
    """One search: vLLM's serving object, whose engine is looked at."""

    def __init__(self, serving: Any) -> None:
        self._serving = serving
        self.cached_tokens: int | None = None  # of the prompt; what later steps find was written by the search itself
        self.engine_client = _Engine(serving.engine_client, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._serving, name)


class _Engine:
    def __init__(self, engine: Any, search: _Search) -> None:
        self._engine, self._search = engine, search

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for output in self._engine.generate(*args, **kwargs):
            if self._search.cached_tokens is None:
                self._search.cached_tokens = output.num_cached_tokens
            yield output
