"""The report of ``icarus bench agents`` as tables: Markdown beside the plots, and a short one on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from icarus.bench import figures
from icarus.bench.profiles import TIGHT
from icarus.bench.report import PAPER

Row = Mapping[str, Any]

_EXPLAINED = (
    "Throughput: workflows a second, all at once. P95: latency of a workflow, at the arrival rate with the largest gap."
)


def show(report: Mapping[str, Any]) -> None:
    """Every gain over conventional on the terminal, and the headline."""
    table = Table(title="ICaRus over conventional models")
    for column in ("workload", "KV budget", "models", "workflows/s arriving", "throughput", "P95 latency"):
        table.add_column(column, justify="right")
    for gain in _sorted(gain for gain in report["gains"] if gain["over"] == "conventional"):
        table.add_row(*_place(gain), _times(gain["throughput"]), _times(gain["p95"]))
    console = Console()
    if table.rows:
        console.print(table)
    for row in report["by_models"]:
        at = "" if row["p95"] is None else f", P95 {_times(row['p95'])} lower at {row['p95_at_rate']:g} workflows/s"
        console.print(f"N={row['models']}, {row['budget']}: {_times(row['throughput'])} the throughput all at once{at}")


def markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Tables of the report, its protocol, and the pictures beside it."""
    sections = {
        "ICaRus over conventional models": [_EXPLAINED, "", *_speedups(report["by_models"])],
        "Where ICaRus is no gain": _losses(report["gains"]),
        "All runs": _runs(report["runs"]),
        "Gains over each peer": _gains(report["gains"]),
        "Runs that failed": [f"    {line}" for text in report["failures"] for line in text.splitlines()],
        "Protocol": ["```", protocol(report["protocol"]), "```"],
    }
    lines = ["# Agent workflows: ICaRus beside conventional models", ""]
    if len(report["commits"]) > 1:
        lines += [f"**These runs are of {len(report['commits'])} commits: {', '.join(report['commits'])}.**", ""]
    lines += [f"![{name}]({name}.png)" for name in pictures]
    for title, body in sections.items():
        if body:
            lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def protocol(found: Mapping[str, Any]) -> str:
    """What a run depends on, one setting a line."""
    lines = []
    for part, values in found.items():
        lines.append(f"{part}:")
        lines += [f"  {key}: {_plain(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines)


def _speedups(rows: Sequence[Row]) -> list[str]:
    lines = _table(["KV budget", "models", "throughput", "paper", "P95 latency", "at workflows/s", "paper"])
    for row in rows:
        paper = [_times(PAPER[key].get(row["models"])) if row["budget"] == TIGHT else "" for key in PAPER]
        at = "" if row["p95_at_rate"] is None else f"{row['p95_at_rate']:g}"
        ours = [_times(row[key]) for key in PAPER]
        lines.append(_line(row["budget"], row["models"], ours[0], paper[0], ours[1], at, paper[1]))
    return lines


def _losses(gains: Sequence[Row]) -> list[str]:
    """What a reader must know before they choose: every place at or below conventional."""
    lost = [gain for gain in gains if gain["over"] == "conventional" and min(gain["throughput"], gain["p95"]) <= 1]
    return _gains(lost) if lost else ["Nowhere in these runs did it fall to the conventional system's figures."]


def _runs(rows: Sequence[Row]) -> list[str]:
    head = ["workload", "KV budget", "models", "workflows/s arriving", "system", "workflows/s", "output tokens/s"]
    head += ["P50 / P95 / P99 workflow (s)", "P95 TTFT (ms)", "P95 TPOT (ms)", "P95 ITL (ms)", "P95 call (ms)"]
    head += ["prompt tokens prefilled", "reused", "preemptions", "peak memory (MB)"]
    lines = _table(head)
    for row in _sorted(rows):
        spread = " / ".join(f"{row[f'p{p}_workflow_ms'] / 1e3:.2f}" for p in figures.PERCENTILES)
        cells = [*_place(row), row["system"], f"{row['workflow_throughput']:.3f}", f"{row['output_throughput']:.1f}"]
        cells += [spread, *(f"{row[f'p95_{name}_ms']:,.0f}" for name in ("ttft", "tpot", "itl", "e2el"))]
        cells += [f"{row[key]:,.0f}" for key in ("prompt_tokens_prefilled", "prompt_tokens_reused", "preemptions")]
        memory = row.get("peak_memory_mb")  # not known where there is no /proc
        lines.append(_line(*cells, f"{memory:,.0f}" if memory else ""))
    return lines


def _gains(gains: Sequence[Row]) -> list[str]:
    head = ["workload", "KV budget", "models", "workflows/s arriving", "ICaRus over", "throughput", "P95 latency"]
    lines = _table([*head, "P50 latency", "prompt tokens prefilled"])
    for gain in sorted(_sorted(gains), key=lambda gain: str(gain["over"])):
        times = (_times(gain[key]) for key in ("throughput", "p95", "p50", "prefilled"))
        lines.append(_line(*_place(gain), gain["over"], *times))
    return lines


def _sorted(rows: Any) -> list[Row]:
    return sorted(rows, key=lambda r: (r["workload"], r["budget"], r["models"], r["rate"] or 1e9, r.get("system", "")))


def _place(row: Row) -> list[str]:
    rate = "all at once" if row["rate"] is None else f"{row['rate']:g}"
    return [row["workload"], row["budget"], str(row["models"]), rate]


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
