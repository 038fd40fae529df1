"""What one run of workflows comes to, under the names that ``vllm bench serve`` writes (its ``benchmarks/serve.py``).

TPOT is (latency - TTFT) / (output tokens - 1) of a call; ITL is the time between chunks of its stream. A workflow's
latency counts from its arrival to the end of its last call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 95, 99)


def of_run(record: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of one finished unit, from its raw record; times in milliseconds, throughput per second."""
    calls, seconds = record["calls"], record["duration"]
    prompts, outputs = (sum(call[key] for call in calls) for key in ("prompt_tokens", "output_tokens"))
    return {
        "duration": round(seconds, 3),
        "completed": len(calls),
        "completed_workflows": len(record["workflows"]),
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": round(len(calls) / seconds, 4),
        "workflow_throughput": round(len(record["workflows"]) / seconds, 5),
        "output_throughput": round(outputs / seconds, 3),
        "total_token_throughput": round((prompts + outputs) / seconds, 3),
        **_spread("ttft", [call["ttft"] for call in calls]),
        **_spread("tpot", [_tpot(call) for call in calls if call["output_tokens"] > 1]),
        **_spread("itl", [itl for call in calls for itl in call["itls"]]),
        **_spread("e2el", [call["latency"] for call in calls]),
        **_spread("workflow", record["workflows"]),
        "prompt_tokens_prefilled": record["prompt_tokens_prefilled"],
        "prompt_tokens_reused": record["prompt_tokens_reused"],
        "preemptions": record["preemptions"],
        "peak_kv_usage": max(share for _, share in record["kv_usage"]),
        "peak_memory_mb": record["peak_memory_mb"],
    }


def _tpot(call: Mapping[str, Any]) -> float:
    value: float = (call["latency"] - call["ttft"]) / (call["output_tokens"] - 1)
    return value


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = 1e3 * np.array(seconds or [0.0])
    found = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
    found |= {f"p{p}": np.percentile(values, p) for p in PERCENTILES}
    return {f"{statistic}_{name}_ms": round(float(value), 2) for statistic, value in found.items()}
