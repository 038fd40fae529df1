"""The report of ``icarus bench agents`` as tables: Markdown beside the plots, and a short one on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from icarus.bench.agents.plan import Place
from icarus.bench.agents.report import PAPER, Gain, Protocol, Report, Row, Speedup
from icarus.bench.agents.settings import TIGHT

_EXPLAINED = (
    "Throughput: workflows a second, all at once. P95: latency of a workflow, at the arrival rate with the largest gap."
)


_PLACE = ("workload", "KV budget", "models", "workflows/s arriving")


def show(report: Report) -> None:
    """The gains over conventional on the terminal."""
    print("\n".join(["ICaRus over conventional models.", _EXPLAINED, *_speedups(report.by_models)]))


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
    rows = []
    for each in speedups:
        throughput, p95 = (_times(PAPER[key].get(each.models)) if each.budget == TIGHT else "" for key in PAPER)
        at = "" if each.p95_at_rate is None else f"{each.p95_at_rate:g}"
        rows.append([each.budget, str(each.models), _times(each.throughput), throughput, _times(each.p95), at, p95])
    return _table(["KV budget", "models", "throughput", "paper", "P95 latency", "at workflows/s", "paper"], rows)


def _losses(gains: Sequence[Gain]) -> list[str]:
    """What a reader must know before they choose: every place at or below conventional."""
    lost = [gain for gain in gains if gain.over == "conventional" and min(gain.throughput, gain.p95) <= 1]
    return _gains(lost) if lost else ["In none of these runs: ICaRus is ahead of conventional models in all of them."]


def _rows(rows: Sequence[Row]) -> list[str]:
    head = [*_PLACE, "system", "workflows/s", "output tokens/s", "P50 / P95 / P99 workflow (s)"]
    head += ["P95 TTFT (ms)", "P95 TPOT (ms)", "P95 ITL (ms)", "P95 call (ms)"]
    head += ["prompt tokens prefilled", "cached", "preemptions", "peak memory (MB)"]
    ordered = sorted(rows, key=lambda row: (*_order(row.place), row.place.system))
    return _table(head, map(_cells, ordered))


def _cells(row: Row) -> list[str]:
    f = row.figures
    return [
        *_place(row.place),
        row.place.system,
        f"{f.workflow_throughput:.3f}",
        f"{f.output_throughput:.1f}",
        " / ".join(f"{ms / 1e3:.2f}" for ms in (f.workflow.p50, f.workflow.p95, f.workflow.p99)),
        *(f"{spread.p95:,.0f}" for spread in (f.ttft, f.tpot, f.itl, f.e2el)),
        *(f"{count:,.0f}" for count in (f.prompt_tokens_prefilled, f.cached_tokens, f.preemptions)),
        f"{f.peak_memory_mb:,.0f}" if f.peak_memory_mb else "",
    ]


def _gains(gains: Sequence[Gain]) -> list[str]:
    rows = [
        [*_place(gain), gain.over, *map(_times, (gain.throughput, gain.p95, gain.p50, gain.prefilled))]
        for gain in sorted(gains, key=lambda gain: (gain.over, *_order(gain)))
    ]
    head = [*_PLACE, "ICaRus over", "throughput", "P95 latency", "P50 latency", "prompt tokens prefilled"]
    return _table(head, rows)


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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
