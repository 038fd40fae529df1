"""What is read of a server's ``/metrics``, by vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from icarus.errors import IcarusError


@dataclass(frozen=True)
class Reading:
    """Counters since the server started, and the share of KV blocks in use at the moment."""

    prefilled: int  # prompt tokens computed
    cached: int  # prompt tokens whose K/V were in the cache
    preemptions: int
    kv_usage: float  # 0 to 1; blocks that only wait to be found again count as free

    @classmethod
    def of(cls, text: str) -> Self:
        """Of the text of ``/metrics``, engines together.

        Raises:
            IcarusError: vLLM's counters are not in it.
        """
        totals = _totals(text)
        try:
            return cls(
                prefilled=int(totals["vllm:prompt_tokens_by_source_total", "local_compute"]),
                cached=int(totals["vllm:prompt_tokens_by_source_total", "local_cache_hit"]),
                preemptions=int(totals["vllm:num_preemptions_total", ""]),
                kv_usage=totals["vllm:kv_cache_usage_perc", ""],
            )
        except KeyError as error:
            name, source = error.args[0]
            raise IcarusError(
                f"The server's /metrics has no {' '.join(filter(None, [name, source]))}; serve with vLLM 0.31 or 0.32."
            ) from error


def _totals(text: str) -> dict[tuple[str, str], float]:
    """Values by name and label ``source``, summed over all other labels."""
    from prometheus_client.parser import text_string_to_metric_families

    families: Any = text_string_to_metric_families
    totals: dict[tuple[str, str], float] = {}
    for family in families(text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("source", "")
            totals[key] = totals.get(key, 0.0) + sample.value
    return totals


def shares(samples: Sequence[tuple[float, Reading]]) -> list[tuple[float, float]]:
    """KV use over time: (seconds, share of blocks in use)."""
    return [(round(at, 2), round(reading.kv_usage, 4)) for at, reading in samples]
