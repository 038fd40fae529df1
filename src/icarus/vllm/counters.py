"""What the engine core and the workers count, for metrics that the front end serves.

Counters are plain integers attached to vLLM's objects, so that a step pays for an addition. engine/counting.py counts
prefix hits and loads, and reads all counters; server/metrics.py shows them.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from icarus.vllm.state import Attached

READ_COUNTERS = "icarus_counters"
"""The method of ``EngineCore`` that returns them."""

LOAD_SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of load times, in seconds."""

Model = str | None
"""A model in counters: an adapter's name, or None for the base model. When counters are read, None becomes the base
model's served name; so no adapter's name is taken."""

Hits = Counter[tuple[Model, Model]]
"""Tokens by writer and reader."""


# ------------------------------------------------------------------------------------------------- workers


@dataclass
class RowCount:
    """Rows of all steps of one worker since it started."""

    scheduled: int = 0
    decoder: int = 0


_ROW_COUNT = Attached[RowCount]("row_count")
"""On a model runner."""


def count_rows(runner: Any, scheduled: int, decoder: int) -> None:
    """Add the rows of one step."""
    count = _ROW_COUNT.get_or_make(runner, RowCount)
    count.scheduled += scheduled
    count.decoder += decoder


def rows_of(worker: Any) -> tuple[int, int]:
    """Scheduled and decoder rows of one worker. Sent to all workers of an engine, which count the same rows."""
    count = _ROW_COUNT.get_or_make(worker.model_runner, RowCount)
    return count.scheduled, count.decoder


# ------------------------------------------------------------------------------------------------- adapters


@dataclass
class Loads:
    """Adapters loaded by one engine core."""

    ids: set[int] = field(default_factory=set)  # that were loaded at least once
    loads: Counter[str] = field(default_factory=Counter)  # by name
    swaps: Counter[str] = field(default_factory=Counter)  # by name: loads that replaced an adapter
    kept: int = 0  # blocks that stayed in the cache when an adapter that shares was replaced
    buckets: list[int] = field(default_factory=lambda: [0] * (len(LOAD_SECONDS_BUCKETS) + 1))
    seconds: float = 0.0  # of all loads
