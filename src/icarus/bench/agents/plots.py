"""Plots of a report as PNG files: readable in a README, with the settings in the caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from icarus.bench.agents.plan import Place
from icarus.bench.agents.records import Run
from icarus.bench.agents.report import PAPER, Protocol, Report, Row, Speedup
from icarus.bench.agents.settings import ROOMY, TIGHT

STYLES = {
    "icarus": ("ICaRus", "#2b7bb0", "o"),
    "conventional": ("conventional", "#d1495b", "s"),
    "stock": ("stock vLLM", "#9aa0a6", "^"),
    "base": ("one base model in all roles", "#5b8c5a", "D"),
}
"""Label, colour and marker of each system, in the order of the legends."""

_STYLE: Any = {  # its type lists all names that there are
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
_PATCH: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
_LONG = 10  # times the shortest run: what takes longer goes beyond the edge of a plot over time
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8}


def draw(report: Report, runs: Sequence[Run], folder: Path) -> list[str]:
    """Draws what the report has data for, as ``folder/NAME.png``; gives the names."""
    settings = report.protocol["settings"]
    swept, budget = settings["workloads"][0], settings["budgets"][0]
    swept_rows = [row for row in report.rows if (row.place.workload, row.place.budget) == (swept, budget)]
    with plt.rc_context(_STYLE):
        figures = {
            "speedup": _speedup(report.by_models, swept),
            "rates": _rates(swept_rows, f"{swept}, {budget} KV budget"),
            "tokens": _tokens(report.rows, swept),
            "kv": _kv(runs, swept, budget),
        }
        drawn = {name: figure for name, figure in figures.items() if figure}
        for name, figure in drawn.items():
            caption = textwrap.fill(_caption(report.protocol), int(14 * figure.get_figwidth()))
            figure.supxlabel(caption, fontsize=7.5, color="#555555")
            figure.savefig(folder / f"{name}.png", dpi=130)
            plt.close(figure)
    return list(drawn)


def _caption(protocol: Protocol) -> str:
    s, machine, kv = protocol["settings"], protocol["machine"], protocol["KV"]
    budgets = ", ".join(f"{name} {tokens:,}" for name, tokens in kv["budget (tokens)"].items())
    repeats = f"medians of up to {s['repeats']} runs" if s["repeats"] > 1 else "one run each"
    engine = ", ".join(f"{name} {version}" for name, version in machine["vllm"].items())
    return (
        f"{Path(s['base']).name}, {s['dtype']}, rank {s['rank']}, {machine['cores']} cores "
        f"({machine['cpu']}), {engine}; "
        f"KV budget in tokens: {budgets}; seed {s['seed']}; "
        f"{s['workflows']} workflows all at once, or arriving for {s['window']:g} s, "
        f"{s['turns']} calls each: {s['system_tokens']} + {s['task_tokens']} prompt tokens first, "
        f"{s['output_tokens']} generated and {s['observation_tokens']} appended a call; "
        f"{repeats}"
    )


def _speedup(by_models: Sequence[Speedup], swept: str) -> Any:
    """Throughput and P95 over conventional, against N."""
    if not by_models:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    titles = {"throughput": "throughput, all at once", "p95": "P95 latency, largest gap at one arrival rate"}
    counts = sorted({each.models for each in by_models} | set(PAPER["p95"]))
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for budget, color, above in ((TIGHT, "#2b7bb0", 8), (ROOMY, "#7fb7d9", -8)):
            points = [(each.models, getattr(each, key)) for each in by_models if each.budget == budget]
            points = [(n, value) for n, value in points if value]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=color, label=f"measured, {budget} KV budget")
            for n, value in points:
                axis.annotate(f"{value:.1f}x", (n, value), (8, above), ha="left", bbox=_PATCH, **_BESIDE)
        axis.plot(PAPER[key].keys(), PAPER[key].values(), "x--", color="#666666", label="paper")
        axis.axhline(1, color="#bbbbbb", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, map(str, counts))
        axis.set(title=f"{swept}: {title}", xlabel="specialists (N)", ylabel="ICaRus over conventional (times)")
        axis.margins(x=0.12, y=0.15)
        axis.set_ylim(bottom=0)
        axis.legend()
    return figure


def _rates(rows: Sequence[Row], title: str) -> Any:
    """Latency and throughput against arrival rate, a column for each N; ``base`` is the same in all."""
    rated = [row for row in rows if row.place.rate is not None]
    counts = sorted({row.place.models for row in rated if row.place.system != "base"})
    if not counts:
        return None
    size = max(3.2 * len(counts), 5.5), 6
    figure, axes = plt.subplots(2, len(counts), figsize=size, sharex=True, sharey="row", squeeze=False)
    for (latency, throughput), models in zip(axes.T, counts, strict=True):
        for system, (label, color, marker) in STYLES.items():
            here = [r for r in rated if r.place.system == system and (r.place.models == models or system == "base")]
            here.sort(key=lambda row: row.place.rate or 0.0)
            rates = [row.place.rate for row in here]
            style = {"color": color, "marker": marker, "label": label, "linestyle": ":" if system == "base" else "-"}
            if here:
                latency.plot(rates, [row.figures.workflow.p95 / 1e3 for row in here], **style)
                throughput.plot(rates, [row.figures.workflow_throughput for row in here], **style)
        latency.set_title(f"N = {models}", loc="center")
        latency.set_yscale("log")
        latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        latency.yaxis.set_major_formatter(ScalarFormatter())
        latency.yaxis.set_minor_formatter(NullFormatter())
        latency.set_xlim(0, 1.08 * max(row.place.rate or 0.0 for row in rated))
        throughput.set_ylim(0, 1.12 * max(row.figures.workflow_throughput for row in rated))
        throughput.set_xlabel("arriving workflows/s")
        for axis in (latency, throughput):
            axis.grid(axis="y", color="#eeeeee")
    axes[0, 0].set_ylabel("P95 workflow latency (s)")
    axes[1, 0].set_ylabel("completed workflows/s")
    axes[0, 0].legend()
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _tokens(rows: Sequence[Row], swept: str) -> Any:
    """Prompt tokens prefilled and reused, all at once, as stacked bars."""
    shown = [row for row in rows if row.place.rate is None and row.place.workload == swept]
    if not shown:
        return None
    shown.sort(key=_bar_order)
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.3 * len(shown)))
    places = range(len(shown))
    prefilled = [row.figures.prompt_tokens_prefilled / 1e3 for row in shown]
    cached = [row.figures.cached_tokens / 1e3 for row in shown]
    axis.barh(places, prefilled, color=[STYLES[row.place.system][1] for row in shown])
    axis.barh(places, cached, left=prefilled, color="#e3e6e8")
    for place, value in zip(places, prefilled, strict=True):
        axis.annotate(f"{value:,.1f}", (value, place), (4, 0), **_BESIDE)
    axis.set_yticks(places, [_bar_label(row.place) for row in shown], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("prompt tokens of a run (thousands): prefilled in colour, reused from the cache in grey")
    axis.set_title(f"{swept}, all at once")
    return figure


def _bar_order(row: Row) -> tuple[bool, bool, int, int]:
    place = row.place
    return place.budget != TIGHT, place.system == "base", place.models, list(STYLES).index(place.system)


def _bar_label(place: Place) -> str:
    models = "" if place.system == "base" else f", N={place.models}"
    return f"{STYLES[place.system][0]}{models}, {place.budget}"


def _kv(runs: Sequence[Run], swept: str, budget: str) -> Any:
    """Share of KV blocks that running requests hold, over time, with the most models and all at once."""
    wanted = [run for run in runs if run.unit.load == (budget, swept, None) and run.unit.repeat == 0]
    most = max((run.unit.models for run in wanted), default=0)
    of = {run.unit.system: run for run in wanted if run.unit.system == "base" or run.unit.models == most}
    shown = [of[system] for system in STYLES if system in of]
    if not shown:
        return None
    figure, axes = plt.subplots(len(shown), 1, figsize=(9, 1.2 + 1.1 * len(shown)), sharex=True, squeeze=False)
    # On CPUs stock operators take so long that on their scale the others would be lines.
    durations = [run.duration for run in shown]
    end = 1.15 * max(d for d in durations if d <= _LONG * min(durations))
    for axis, run in zip(axes[:, 0], shown, strict=True):
        label, color, _ = STYLES[run.unit.system]
        times, shares = zip(*run.kv_usage, strict=True)
        axis.fill_between(times, [100 * share for share in shares], color=color, alpha=0.6, linewidth=0)
        if run.duration <= end:
            axis.axvline(run.duration, color=color, linewidth=1)
            axis.annotate(f"ends at {run.duration:.0f} s", (run.duration, 80), (3, 0), **_BESIDE)
        else:
            axis.annotate(f"goes on to {run.duration:.0f} s", (end, 80), (-3, 0), ha="right", **_BESIDE)
        axis.set(ylim=(0, 100), yticks=[0, 50, 100])
        axis.set_title(label, fontsize=8, color=color)
    axes[-1, 0].set(xlim=(0, end), xlabel="seconds since all workflows arrived")
    figure.supylabel("KV blocks held by requests (%)", fontsize=9)
    figure.suptitle(f"{swept}, N = {most}, {budget} KV budget, all at once", fontsize=10, x=0.01, ha="left")
    return figure
