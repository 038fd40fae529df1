"""What is read of a server's ``/metrics``, by vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

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
        totals: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.name, sample.labels.get("source", "")
                totals[key] = totals.get(key, 0.0) + sample.value
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
