"""The report of ``icarus bench agents``: medians over repeats, and what ICaRus gains over each peer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from icarus.bench import figures
from icarus.bench.profiles import ROOMY, TIGHT

Row = dict[str, Any]

PAPER = {"throughput": {2: 1.4, 4: 2.3, 8: 3.8}, "p95": {2: 3.8, 4: 5.1, 8: 11.1}}
"""arXiv 2603.13281, by the number of models: throughput and P95 latency, times better than conventional models."""

_PLACE = ("system", "models", "budget", "workload", "rate")


def build(protocol: Mapping[str, Any], records: Iterable[Mapping[str, Any]], failures: Sequence[str] = ()) -> Row:
    """The whole report from the raw records."""
    records = list(records)
    rows = medians(records)
    swept = protocol["settings"]["workloads"][0]
    gains = [gain for row in rows if row["system"] == "icarus" for gain in _gains(records, rows, row)]
    return {
        "speedup": headline(gains, swept),
        "by_models": by_models(gains, swept),
        "gains": gains,
        "runs": rows,
        "failures": list(failures),
        "commits": sorted({record["commit"] for record in records if record["commit"]}),  # one, or it is a mixture
        "protocol": dict(protocol),
    }


def medians(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row for each (system, models, budget, workload, rate): the median over its repeats of every figure."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for record in records:
        place = tuple(record["unit"][key] for key in _PLACE)
        groups.setdefault(place, []).append(figures.of_run(record))
    return [
        dict(zip(_PLACE, place, strict=True))
        | {"repeats": len(runs)}
        | {key: statistics.median(run[key] for run in runs) for key in runs[0] if runs[0][key] is not None}
        for place, runs in groups.items()
    ]


def _gains(records: Sequence[Mapping[str, Any]], rows: Sequence[Row], place: Row) -> Iterable[Row]:
    """ICaRus in one place against every peer there; base has one model whatever N is.

    Repeats have texts and arrivals of their own, so only those that both have are compared.
    """
    for other in rows:
        same = all(other[key] == place[key] for key in ("budget", "workload", "rate"))
        if other["system"] == "icarus" or not same:
            continue
        if other["models"] != place["models"] and other["system"] != "base":
            continue
        at_ours, at_peer = _by_repeat(records, place), _by_repeat(records, other)
        both = at_ours.keys() & at_peer.keys()
        if not both:
            continue
        ours, peer = (medians(found[repeat] for repeat in both)[0] for found in (at_ours, at_peer))
        yield {key: ours[key] for key in _PLACE[1:]} | {
            "over": peer["system"],
            "throughput": round(ours["workflow_throughput"] / peer["workflow_throughput"], 3),
            "p95": round(peer["p95_workflow_ms"] / ours["p95_workflow_ms"], 3),
            "p50": round(peer["p50_workflow_ms"] / ours["p50_workflow_ms"], 3),
            "prefilled": round(peer["prompt_tokens_prefilled"] / max(ours["prompt_tokens_prefilled"], 1), 3),
        }


def _by_repeat(records: Iterable[Mapping[str, Any]], place: Row) -> dict[int, Mapping[str, Any]]:
    """The records of one place."""
    here = (record for record in records if all(record["unit"][key] == place[key] for key in _PLACE))
    return {record["unit"]["repeat"]: record for record in here}


def by_models(gains: Sequence[Row], swept: str) -> list[Row]:
    """For each budget and N, over conventional: throughput all at once, and the largest gap of P95 at one rate."""
    found = []
    peers = [gain for gain in gains if gain["over"] == "conventional" and gain["workload"] == swept]
    for budget, models in sorted(
        {(gain["budget"], gain["models"]) for gain in peers}, key=lambda p: (p[0] == ROOMY, p)
    ):
        here = [gain for gain in peers if (gain["budget"], gain["models"]) == (budget, models)]
        at_once = [gain for gain in here if gain["rate"] is None]
        rated = max((gain for gain in here if gain["rate"] is not None), key=lambda g: g["p95"], default=None)
        found.append(
            {
                "budget": budget,
                "models": models,
                "throughput": at_once[0]["throughput"] if at_once else None,
                "p95": rated["p95"] if rated else None,
                "p95_at_rate": rated["rate"] if rated else None,
                "p95_all_at_once": at_once[0]["p95"] if at_once else None,
            }
        )
    return found


def headline(gains: Sequence[Row], swept: str) -> dict[str, float | None]:
    """ICaRus over conventional with the most models, in the first budget: what the goals are about."""
    found = by_models(gains, swept)
    tight = [row for row in found if row["budget"] == TIGHT] or found
    best = max(tight, key=lambda row: row["models"], default=None)
    return {key: best[key] if best else None for key in ("throughput", "p95")}
