"""What is read of a server's ``/metrics`` (Prometheus text format, vLLM's names), and what a run makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from icarus.errors import IcarusError

_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_SOURCE = re.compile(r'source="([^"]*)"')


@dataclass(frozen=True)
class Reading:
    """Counters since the server started, and the share of KV blocks in use at the moment."""

    prefilled: int  # prompt tokens computed
    reused: int  # prompt tokens whose K/V were in the cache
    preemptions: int
    kv_usage: float  # 0 to 1; blocks that only wait to be found again count as free


def read(text: str) -> Reading:
    """Raises IcarusError where vLLM's counters are not there."""
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if match := _LINE.match(line):
            name, labels, value = match.groups()
            source = _SOURCE.search(labels or "")
            key = f"{name}/{source.group(1)}" if source else name
            totals[key] = totals.get(key, 0.0) + float(value)
    try:
        return Reading(
            prefilled=int(totals["vllm:prompt_tokens_by_source_total/local_compute"]),
            reused=int(totals["vllm:prompt_tokens_by_source_total/local_cache_hit"]),
            preemptions=int(totals["vllm:num_preemptions_total"]),
            kv_usage=totals["vllm:kv_cache_usage_perc"],
        )
    except KeyError as error:
        raise IcarusError(
            f"The server's /metrics has no {error.args[0]}: its vLLM is another one than 0.32."
        ) from error


def between(first: Reading, last: Reading, samples: Sequence[tuple[float, float]]) -> Mapping[str, object]:
    """What happened from one reading to another; ``samples`` are (seconds, share of blocks in use)."""
    return {
        "prompt_tokens_prefilled": last.prefilled - first.prefilled,
        "prompt_tokens_reused": last.reused - first.reused,
        "preemptions": last.preemptions - first.preemptions,
        "kv_usage": [[round(at, 2), round(share, 4)] for at, share in samples],
    }
