"""What one run of workflows comes to, under the names that ``vllm bench serve`` writes (its ``benchmarks/serve.py``).

TPOT is (latency - TTFT) / (output tokens - 1) of a call; ITL is the time between chunks of its stream. A workflow's
latency counts from its arrival to the end of its last call.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np

from icarus.bench.agents.records import Run


@dataclass(frozen=True)
class Spread:
    """Of a latency, in milliseconds."""

    mean: float
    median: float
    std: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """Of all values, 0 where there is none."""
        values = 1e3 * np.array(seconds or [0.0])
        spread = (values.mean(), np.median(values), values.std(), *np.percentile(values, (50, 95, 99)))
        return cls(*(round(float(value), 2) for value in spread))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one run, or medians over its repeats; throughputs are per second."""

    duration: float
    completed: float
    completed_workflows: float
    total_input_tokens: float
    total_output_tokens: float
    request_throughput: float
    workflow_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2el: Spread
    workflow: Spread
    prompt_tokens_prefilled: float
    cached_tokens: float
    preemptions: float
    peak_kv_usage: float
    peak_memory_mb: float | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """Of one finished run."""
        calls, seconds = run.calls, run.duration
        prompts, outputs = sum(call.prompt_tokens for call in calls), sum(call.output_tokens for call in calls)
        return cls(
            duration=round(seconds, 3),
            completed=len(calls),
            completed_workflows=len(run.workflows),
            total_input_tokens=prompts,
            total_output_tokens=outputs,
            request_throughput=round(len(calls) / seconds, 4),
            workflow_throughput=round(len(run.workflows) / seconds, 5),
            output_throughput=round(outputs / seconds, 3),
            total_token_throughput=round((prompts + outputs) / seconds, 3),
            ttft=Spread.of([call.ttft for call in calls]),
            tpot=Spread.of([(c.latency - c.ttft) / (c.output_tokens - 1) for c in calls if c.output_tokens > 1]),
            itl=Spread.of([itl for call in calls for itl in call.itls]),
            e2el=Spread.of([call.latency for call in calls]),
            workflow=Spread.of(run.workflows),
            prompt_tokens_prefilled=run.prompt_tokens_prefilled,
            cached_tokens=run.cached_tokens,
            preemptions=run.preemptions,
            peak_kv_usage=max(share for _, share in run.kv_usage),
            peak_memory_mb=run.peak_memory_mb,
        )

    def as_json(self) -> dict[str, float]:
        """Flat, with names as ``p95_ttft_ms``; what is not known is left out."""
        flat: dict[str, float] = {}
        for name, value in vars(self).items():
            if isinstance(value, Spread):
                flat |= {f"{statistic}_{name}_ms": number for statistic, number in vars(value).items()}
            elif value is not None:
                flat[name] = value
        return flat


Kind = TypeVar("Kind", Figures, Spread)


def medians(each: Sequence[Kind]) -> Kind:
    """The median of every figure; unknown where it is unknown in one of them."""
    values: dict[str, Any] = {}
    for entry in fields(each[0]):
        column = [getattr(one, entry.name) for one in each]
        if isinstance(column[0], Spread):
            values[entry.name] = medians(column)
        else:
            values[entry.name] = None if None in column else statistics.median(column)
    return type(each[0])(**values)
