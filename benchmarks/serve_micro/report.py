"""What the engines' answers come to: medians, bounds and ratios, and the tables on the terminal."""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serve_micro import bounds, ratios
from benchmarks.serve_micro.plan import Measurement, Message, Sizes
from icarus.bench import measure

Answers = dict[str, dict[str, list[Message]]]
"""Of one start of the engines, by measurement and side, in the order of rounds."""


def build(
    planned: Iterable[Measurement],
    starts: Sequence[Answers],
    sizes: Sizes,
    machine: bounds.Machine,
    shape: bounds.Shape,
    adapter_weights: Mapping[str, int],
) -> dict[str, Any]:
    """The report's figures and ratios, and the samples that they are made of."""
    tables: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    seconds = [_seconds(planned, answers) for answers in starts]
    for measurement in planned:
        sides = {}
        for side in measurement.sides:
            given = [answer for answers in starts for answer in answers[measurement.name][side.name]]
            taken = [sample for start in seconds for sample in start[measurement.name][side.name]]
            least = bounds.bound(machine, shape, measurement.works(side, sizes, adapter_weights[side.system]))
            sides[side.name] = {
                "median": round(measurement.figure(statistics.median(taken), sizes), 2),
                **measure.summary(taken),
                "bound": least | {"share": round(least["bound_ms"] / 1e3 / statistics.median(taken), 3)},
            }
            samples.setdefault(measurement.name, {})[side.name] = [_rounded(answer) for answer in given]
            if measurement.turns > 1:
                sides[side.name]["prefilled_tokens"] = max(map(prefilled, given))
        tables[measurement.name] = {"unit": measurement.unit, "sides": sides}
    return {"measurements": tables, "ratios": ratios.results(seconds), "samples": samples}


def write(report: Mapping[str, Any], file: Path) -> None:
    """The report into ``file``, and its samples, which are many, into ``FILE-samples.json.gz`` beside it."""
    figures = {key: value for key, value in report.items() if key != "samples"}
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    samples = json.dumps(report["samples"]) + "\n"
    file.with_name(f"{file.stem}-samples.json.gz").write_bytes(gzip.compress(samples.encode(), mtime=0))


def prefilled(answer: Message) -> int:
    """Prompt tokens that were computed in a chain, that is, were not in the cache."""
    return sum(turn["prompt_tokens"] - turn["cached_tokens"] for turn in answer["turns"])


def _seconds(planned: Iterable[Measurement], answers: Answers) -> dict[str, dict[str, list[float]]]:
    """What each sample of a start took, by measurement and side."""
    return {
        measurement.name: {
            side: [measurement.seconds(answer) for answer in given] for side, given in answers[measurement.name].items()
        }
        for measurement in planned
    }


def _rounded(answer: Any) -> Any:
    """Seconds to the microsecond."""
    if isinstance(answer, dict):
        return {name: _rounded(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [_rounded(value) for value in answer]
    return round(answer, 6) if isinstance(answer, float) else answer


def show(report: Mapping[str, Any]) -> None:
    """Tables on the terminal."""
    console = Console()
    settings = report["settings"]
    for name, table in report["measurements"].items():
        console.print(_table(f"{name}, rank {settings['rank']}, {settings['dtype']}", table["unit"], table["sides"]))
    console.print(_ratios(report["ratios"]))
    machine = report["machine"]
    console.print(
        f"Bounds: this machine reads {machine['read_bytes_per_s'] / 1e9:.1f} GB/s and multiplies at "
        f"{machine['flops_per_s'] / 1e12:.2f} TFLOP/s, measured before. What is above a bound is the engine's own time "
        "(--profile shows whose)."
    )


def _table(title: str, unit: str, sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """One measurement: a line for each side."""
    table = Table(title=title)
    chain = any("prefilled_tokens" in figures for figures in sides.values())
    table.add_column("")
    for column in (unit, "ms (quartiles)", "bound, its share", *(["prefilled"] if chain else [])):
        table.add_column(column, justify="right")
    for side, figures in sides.items():
        least = figures["bound"]
        row = [
            side,
            f"{figures['median']:.1f}",
            f"{figures['median_ms']:.1f} ({figures['p25_ms']:.1f} to {figures['p75_ms']:.1f})",
            f"{least['by']} {least['bound_ms']:.1f} ms, {least['share']:.0%}",
        ]
        table.add_row(*row, *([f"{figures['prefilled_tokens']:,} tokens"] if chain else []))
    return table


def _ratios(ratios: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(title="Ratios of speed")
    table.add_column("")
    for column in ("median of the starts", "lowest and highest of a round"):
        table.add_column(column, justify="right")
    for ratio in ratios:
        table.add_row(ratio["what"], f"{ratio['value']:.2f}x", f"{ratio['lowest']:.2f} to {ratio['highest']:.2f}")
    return table
