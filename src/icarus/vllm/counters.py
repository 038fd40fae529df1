"""Counters: what the engine core and the workers count, and the front end shows.

They are plain integers on vLLM's own objects, so that a step pays for an addition. engine/counting.py counts prefix
hits and loads and reads all of them out; server/metrics.py shows them.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from icarus.vllm.state import Attached

Model = str | None
"""A model in counters: the adapter's name, or None for the base model, whose served name takes its place when counters
are read. So an adapter may have any name."""

Hits = Counter[tuple[Model, Model]]
"""Tokens by writer and reader."""

READ_COUNTERS = "icarus_counters"
"""What ``EngineCore.collective_rpc`` is asked for instead of a method of the workers."""

LOAD_SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of loading times, in s."""


# ------------------------------------------------------------------------------------------------- workers


@dataclass
class RowCount:
    """Rows of all steps of one worker since it started."""

    scheduled: int = 0
    decoder: int = 0


_ROW_COUNT = Attached[RowCount]("row_count")


def count_rows(runner: Any, scheduled: int, decoder: int) -> None:
    """Add the rows of one step."""
    count = _ROW_COUNT.get_or_make(runner, RowCount)
    count.scheduled += scheduled
    count.decoder += decoder


def rows_of(worker: Any) -> tuple[int, int]:
    """Scheduled and decoder rows of one worker; sent to all of them, which count the same."""
    count = _ROW_COUNT.get_or_make(worker.model_runner, RowCount)
    return count.scheduled, count.decoder


# ------------------------------------------------------------------------------------------------- adapters


@dataclass
class Loads:
    """Adapters loaded by one engine core."""

    ids: set[int] = field(default_factory=set)
    loads: Counter[str] = field(default_factory=Counter)
    swaps: Counter[str] = field(default_factory=Counter)
    kept: int = 0  # blocks that stayed in the cache when an adapter that shares was replaced
    buckets: list[int] = field(default_factory=lambda: [0] * (len(LOAD_SECONDS_BUCKETS) + 1))
    seconds: float = 0.0  # of all loads
