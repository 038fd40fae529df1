"""The report of ``icarus bench agents``: medians over repeats, what ICaRus gains over each peer, and tables of both."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from icarus.bench import figures
from icarus.bench.profiles import ROOMY, TIGHT

Row = dict[str, Any]

PAPER = {"p95": {2: 3.8, 4: 5.1, 8: 11.1}, "throughput": {2: 1.4, 4: 2.3, 8: 3.8}}
"""arXiv 2603.13281, by the number of models: lower P95 latency, higher throughput, over conventional models."""

_PLACE = ("system", "models", "budget", "workload", "rate")


def build(protocol: Mapping[str, Any], records: Iterable[Mapping[str, Any]], failures: Sequence[str] = ()) -> Row:
    """The whole report from the raw records."""
    rows = medians(records)
    swept = protocol["settings"]["workloads"][0]
    gains = [gain for row in rows if row["system"] == "icarus" for gain in _gains(rows, row)]
    return {
        "speedup": headline(gains, swept),
        "by_models": by_models(gains, swept),
        "gains": gains,
        "runs": rows,
        "failures": list(failures),
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


def _gains(rows: Sequence[Row], ours: Row) -> Iterable[Row]:
    """ICaRus against every peer in the same place; single has one model whatever N is."""
    for peer in rows:
        same = all(peer[key] == ours[key] for key in ("budget", "workload", "rate"))
        if peer["system"] == "icarus" or not same:
            continue
        if peer["models"] != ours["models"] and peer["system"] != "single":
            continue
        yield {key: ours[key] for key in _PLACE[1:]} | {
            "over": peer["system"],
            "throughput": round(ours["workflow_throughput"] / peer["workflow_throughput"], 3),
            "p95": round(peer["p95_workflow_ms"] / ours["p95_workflow_ms"], 3),
            "p50": round(peer["p50_workflow_ms"] / ours["p50_workflow_ms"], 3),
            "prefilled": round(peer["prompt_tokens_prefilled"] / max(ours["prompt_tokens_prefilled"], 1), 3),
        }


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


# ---------------------------------------------------------------------------------------------- Markdown


def markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Tables of the report, its protocol, and the pictures beside it."""
    parts = [
        "# Agent workflows: ICaRus beside conventional models",
        "",
        *(f"![{name}]({name}.png)" for name in pictures),
    ]
    parts += ["", "## ICaRus over conventional models", "", *_speedups(report), ""]
    parts += [
        "## All runs",
        "",
        *_runs(report["runs"]),
        "",
        "## Gains over each peer",
        "",
        *_all_gains(report["gains"]),
    ]
    if report["failures"]:
        parts += [
            "",
            "## Runs that failed",
            "",
            *(f"    {line}" for text in report["failures"] for line in text.splitlines()),
        ]
    parts += ["", "## Protocol", "", "```", protocol_text(report["protocol"]), "```", ""]
    return "\n".join(parts)


def _speedups(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "Throughput: workflows a second, all at once. P95: latency of a workflow, at the arrival rate with the largest "
        "gap.",
        "",
        *_table(["KV budget", "models", "throughput", "paper", "P95 latency", "at workflows/s", "paper"]),
    ]
    for row in report["by_models"]:
        n = row["models"]
        paper = [_times(PAPER[key].get(n)) if row["budget"] == TIGHT else "" for key in ("throughput", "p95")]
        at = "" if row["p95_at_rate"] is None else f"{row['p95_at_rate']:g}"
        lines.append(_line(row["budget"], n, _times(row["throughput"]), paper[0], _times(row["p95"]), at, paper[1]))
    return lines


def _runs(rows: Sequence[Row]) -> list[str]:
    head = ["workload", "KV budget", "models", "workflows/s arriving", "system", "workflows/s", "output tokens/s"]
    head += ["P50 / P95 / P99 workflow (s)", "P95 TTFT (ms)", "P95 TPOT (ms)", "P95 ITL (ms)", "P95 call (ms)"]
    head += ["prompt tokens prefilled", "reused", "preemptions", "peak memory (MB)"]
    lines = _table(head)
    for row in sorted(rows, key=lambda r: (r["workload"], r["budget"], r["models"], r["rate"] or 1e9, r["system"])):
        spread = " / ".join(f"{row[f'p{p}_workflow_ms'] / 1e3:.2f}" for p in figures.PERCENTILES)
        lines.append(
            _line(
                row["workload"], row["budget"], row["models"], _rate(row["rate"]), row["system"],
                f"{row['workflow_throughput']:.3f}", f"{row['output_throughput']:.1f}", spread,
                *(f"{row[f'p95_{name}_ms']:,.0f}" for name in ("ttft", "tpot", "itl", "e2el")),
                f"{row['prompt_tokens_prefilled']:,.0f}", f"{row['prompt_tokens_reused']:,.0f}",
                f"{row['preemptions']:.0f}", f"{row['peak_memory_mb']:,.0f}" if row.get("peak_memory_mb") else "",
            )
        )  # fmt: skip
    return lines


def _all_gains(gains: Sequence[Row]) -> list[str]:
    head = ["workload", "KV budget", "models", "workflows/s arriving", "ICaRus over", "throughput", "P95 latency"]
    lines = _table([*head, "P50 latency", "prompt tokens prefilled"])
    for gain in sorted(gains, key=lambda g: (g["over"], g["workload"], g["budget"], g["models"], g["rate"] or 1e9)):
        figures_ = (_times(gain[key]) for key in ("throughput", "p95", "p50", "prefilled"))
        lines.append(
            _line(gain["workload"], gain["budget"], gain["models"], _rate(gain["rate"]), gain["over"], *figures_)
        )
    return lines


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """What a run depends on, one setting a line."""
    lines = []
    for part, values in protocol.items():
        lines.append(f"{part}:")
        lines += [f"  {key}: {_plain(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(head: Sequence[str]) -> list[str]:
    return [_line(*head), _line(*("---" for _ in head))]


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _rate(rate: float | None) -> str:
    return "all at once" if rate is None else f"{rate:g}"
