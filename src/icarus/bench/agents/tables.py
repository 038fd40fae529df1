"""The report of ``icarus bench agents`` as tables: Markdown beside the plots, and a short one on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from icarus.bench.agents.plan import Place
from icarus.bench.agents.report import PAPER, Gain, Protocol, Report, Row, Speedup
from icarus.bench.agents.settings import TIGHT

_EXPLAINED = (
    "Throughput: workflows a second, all at once. P95: latency of a workflow, at the arrival rate with the largest gap."
)


def show(report: Report) -> None:
    """Every gain over conventional on the terminal, and the headline."""
    table = Table(title="ICaRus over conventional models")
    for column in ("workload", "KV budget", "models", "workflows/s arriving", "throughput", "P95 latency"):
        table.add_column(column, justify="right")
    for gain in _sorted_gains(gain for gain in report.gains if gain.over == "conventional"):
        table.add_row(*_place(gain), _times(gain.throughput), _times(gain.p95))
    console = Console()
    if table.rows:
        console.print(table)
    for speedup in report.by_models:
        at = f", P95 {_times(speedup.p95)} lower at {speedup.p95_at_rate:g} workflows/s" if speedup.p95 else ""
        throughput = f"{_times(speedup.throughput)} the throughput all at once"
        console.print(f"N={speedup.models}, {speedup.budget}: {throughput}{at}")


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """Tables of the report, its protocol, and the pictures beside it."""
    sections = {
        "ICaRus over conventional models": [_EXPLAINED, "", *_speedups(report.by_models)],
        "Where ICaRus gains nothing": _losses(report.gains),
        "All runs": _rows(report.rows),
        "Gains over each peer": _gains(report.gains),
        "Runs that failed": [f"    {line}" for text in report.failures for line in text.splitlines()],
        "Protocol": ["```", protocol(report.protocol), "```"],
    }
    lines = ["# Agent workflows: ICaRus beside conventional models", ""]
    if len(report.commits) > 1:
        lines += [f"**These runs are of {len(report.commits)} commits: {', '.join(report.commits)}.**", ""]
    lines += [f"![{name}]({name}.png)" for name in pictures]
    for title, body in sections.items():
        if body:
            lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def protocol(parts: Protocol) -> str:
    """What a run depends on, one setting a line."""
    lines = []
    for part, values in parts.items():
        lines.append(f"{part}:")
        lines += [f"  {key}: {_plain(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines)


def _speedups(speedups: Sequence[Speedup]) -> list[str]:
    lines = _table(["KV budget", "models", "throughput", "paper", "P95 latency", "at workflows/s", "paper"])
    for each in speedups:
        throughput, p95 = (_times(PAPER[key].get(each.models)) if each.budget == TIGHT else "" for key in PAPER)
        at = "" if each.p95_at_rate is None else f"{each.p95_at_rate:g}"
        cells = [_times(each.throughput), throughput, _times(each.p95), at, p95]
        lines.append(_line(each.budget, each.models, *cells))
    return lines


def _losses(gains: Sequence[Gain]) -> list[str]:
    """What a reader must know before they choose: every place at or below conventional."""
    lost = [gain for gain in gains if gain.over == "conventional" and min(gain.throughput, gain.p95) <= 1]
    return _gains(lost) if lost else ["In none of these runs: ICaRus is ahead of conventional models in all of them."]


def _rows(rows: Sequence[Row]) -> list[str]:
    head = ["workload", "KV budget", "models", "workflows/s arriving", "system", "workflows/s", "output tokens/s"]
    head += ["P50 / P95 / P99 workflow (s)", "P95 TTFT (ms)", "P95 TPOT (ms)", "P95 ITL (ms)", "P95 call (ms)"]
    head += ["prompt tokens prefilled", "cached", "preemptions", "peak memory (MB)"]
    lines = _table(head)
    for row in sorted(rows, key=lambda row: (*_order(row.place), row.place.system)):
        figures = row.figures
        spread = " / ".join(
            f"{ms / 1e3:.2f}" for ms in (figures.workflow.p50, figures.workflow.p95, figures.workflow.p99)
        )
        cells = [*_place(row.place), row.place.system]
        cells += [f"{figures.workflow_throughput:.3f}", f"{figures.output_throughput:.1f}", spread]
        cells += [f"{each.p95:,.0f}" for each in (figures.ttft, figures.tpot, figures.itl, figures.e2el)]
        counts = (figures.prompt_tokens_prefilled, figures.cached_tokens, figures.preemptions)
        memory = figures.peak_memory_mb
        lines.append(_line(*cells, *(f"{count:,.0f}" for count in counts), f"{memory:,.0f}" if memory else ""))
    return lines


def _gains(gains: Sequence[Gain]) -> list[str]:
    head = ["workload", "KV budget", "models", "workflows/s arriving", "ICaRus over", "throughput", "P95 latency"]
    lines = _table([*head, "P50 latency", "prompt tokens prefilled"])
    for gain in sorted(_sorted_gains(gains), key=lambda gain: gain.over):
        times = (_times(value) for value in (gain.throughput, gain.p95, gain.p50, gain.prefilled))
        lines.append(_line(*_place(gain), gain.over, *times))
    return lines


def _sorted_gains(gains: Iterable[Gain]) -> list[Gain]:
    return sorted(gains, key=_order)


def _order(here: Place | Gain) -> tuple[str, str, int, float]:
    """By workload, budget, models and rate, all at once last."""
    return here.workload, here.budget, here.models, here.rate or float("inf")


def _place(here: Place | Gain) -> list[str]:
    rate = "all at once" if here.rate is None else f"{here.rate:g}"
    return [here.workload, here.budget, str(here.models), rate]


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
