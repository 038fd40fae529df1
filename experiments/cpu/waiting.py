"""What the waiting of OpenMP's threads costs alone, and beside another process that computes.

    python -m experiments.cpu.waiting process serve --rounds 4 --json results/cpu-waiting.json
    python -m experiments.cpu.waiting process --ways default 1000 passive --rounds 4 --json results/cpu-waiting.json

Between two parallel regions the threads of GNU's OpenMP, which torch brings along and vLLM loads first, spin for some
milliseconds before they sleep. Where two processes have as many threads as there are cores, a thread that spins takes
the core from one that has work. Each workload runs in turn with the ways of waiting in ``WAYS``, alone and beside a
neighbour that multiplies small matrices with two threads and waits as libraries do by default. Figures are seconds;
beside them stands how many products a second the neighbour came to. A call is added to those that the file has already;
the default, which each has first, is measured beside the neighbour once, since it takes so long there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serve_micro import engines
from benchmarks.serve_micro.engine_process import EngineProcess
from benchmarks.serve_micro.plan import Sizes, measurements
from icarus import arguments, base_model, packaged_model
from icarus.bench import measure

WAYS: dict[str, dict[str, str]] = {
    "default": {},  # 300,000 turns of the loop in which it spins
    **{str(count): {"GOMP_SPINCOUNT": str(count)} for count in (30_000, 10_000, 3_000, 1_000)},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""Variables by name."""

WORK = (sys.executable, "-m", "experiments.cpu.waiting_work")
"""The work in process."""

NEIGHBOUR = """
import select, sys, torch
torch.set_num_threads(2)
matrix, count = torch.randn(256, 256), 0
while True:
    matrix.mm(matrix)
    count += 1
    if select.select([sys.stdin], [], [], 0)[0]:
        sys.stdin.readline()
        print(count, flush=True)
"""

Figures = dict[str, float]
Run = Callable[[str], Figures]


class Neighbour:
    """A process that computes within ``beside`` and is stopped elsewhere."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._count()
        self._process.send_signal(signal.SIGSTOP)

    @contextmanager
    def beside(self, figures: Figures) -> Iterator[None]:
        """It computes during the block, and how many products a second it came to stands in the figures."""
        self._process.send_signal(signal.SIGCONT)
        before, started = self._count(), time.perf_counter()
        yield
        figures["neighbour, products/s"] = (self._count() - before) / (time.perf_counter() - started)
        self._process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """Of the process."""
        self._process.kill()
        self._process.wait()

    def _count(self) -> int:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write("\n")
        return int(stdout.readline())


def variables(way: str) -> dict[str, str]:
    """Of a process that waits in this way."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return {**kept, **WAYS[way], "OMP_NUM_THREADS": "2"}


@contextmanager
def process(ways: list[str]) -> Iterator[Run]:
    """Turns of a specialist as ``make demo`` has them, and training steps; a process for each way."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        started = {
            way: stack.enter_context(EngineProcess(way, Path(folder, f"{way}.log"), variables(way), WORK))
            for way in ways
        }
        yield lambda way: started[way].ask({})


@contextmanager
def serve(ways: list[str]) -> Iterator[Run]:
    """Engines with ICaRus adapters, one for each way: decoding and prefill, as ``benchmarks.serve_micro`` has them."""
    sizes = Sizes(prompt=500, steps=16, starts=1, repeats=1, vocabulary=49152, seed=time.time_ns())
    planned = [one for one in measurements(["icarus"]) if one.name in ("decode, batch 1", "decode, batch 8", "prefill")]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        adapters = engines.make_adapters(packaged_model.PACKAGED, Path(folder), ["icarus"])["icarus"]
        options = {"model": str(base_model.folder(packaged_model.PACKAGED)), "dtype": measure.served_dtype()}
        started = {}
        for way in ways:
            environment = engines.environment("icarus", variables(way))
            started[way] = stack.enter_context(EngineProcess(way, Path(folder, f"{way}.log"), environment))
            started[way].ask({"engine": {**options, **engines.ENGINE, **engines.LORA}, "adapters": adapters})
        rounds = dict.fromkeys(ways, -1)

        def run(way: str) -> Figures:
            figures = {}
            for one in planned:
                command = one.command(one.sides[0], rounds[way], sizes)
                figures[one.name] = one.seconds(started[way].ask(command))
            rounds[way] += 1
            return figures

        yield run


WORKLOADS = {"process": process, "serve": serve}


def measured(run: Run, ways: list[str], neighbour: Neighbour, round_: int) -> Iterator[tuple[str, str, Figures]]:
    """One round: condition, way and figures of each."""
    ways = ways[:: 1 if round_ % 2 == 0 else -1]
    for way in ways:
        yield "alone", way, run(way)
    for way in ways:
        if way == "default" and round_:
            continue
        beside: Figures = {}
        with neighbour.beside(beside):
            figures = run(way)
        yield "beside", way, figures | beside


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By condition and figure, for each way: median seconds over those of the default in each run."""
    table: dict[str, Any] = {}
    for run in runs:
        for condition, ways in run["samples"].items():
            for way, rounds in ways.items():
                for figure in rounds[0]:
                    shares = table.setdefault(f"{condition}: {figure}", {}).setdefault(way, [])
                    own, default = (
                        statistics.median(one[figure] for one in samples) for samples in (rounds, ways["default"])
                    )
                    shares.append(round(own / default, 3))
    return table


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the default is one of them")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # all that it started ends with it
    runs: list[dict[str, Any]] = json.loads(options.json.read_text())["runs"] if options.json.exists() else []
    neighbour = Neighbour()
    try:
        for workload in options.workloads:
            samples: dict[str, Any] = {}
            runs.append({"workload": workload, "samples": samples})
            with WORKLOADS[workload](options.ways) as run:
                for way in options.ways:
                    run(way)
                for round_ in range(options.rounds):
                    for condition, way, figures in measured(run, options.ways, neighbour, round_):
                        rounded = {name: round(value, 5) for name, value in figures.items()}
                        samples.setdefault(condition, {}).setdefault(way, []).append(rounded)
                        print(workload, condition, way, rounded, flush=True)
                        report = {"settings": measure.settings(ways=WAYS), "over default": summary(runs), "runs": runs}
                        arguments.write_json(report, str(options.json))
    finally:
        neighbour.end()


if __name__ == "__main__":
    main()
