"""All malformed adapters by every way in, and the server alive after each."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.soak import surfaces
from benchmarks.soak.malformed import ICARUS, Case
from benchmarks.soak.shop import Shop
from benchmarks.soak.surfaces import BROKEN, REFUSED, Running, Seen, fault, running

STARTED = (
    "icarus: no adapter_config.json",
    "icarus: NaN as the middle number",
    "icarus: header length +1",
    "conventional: all NaN",
    "conventional: shape too large",
)
"""Cases that are also given to real starts of ``icarus serve``."""

WATCH_SECONDS = 600.0
"""Within which something is heard of an adapter in the watched folder."""

AT_ONCE = 20
"""Adapters in the watched folder at a time."""

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Trial:
    """What became of one case: by each way in, and what is wrong with it."""

    case: Case
    folder: Path
    seen: dict[str, Seen]
    faults: list[str]

    def note(self, way: str, seen: Seen, more: str = "") -> None:
        """One way in, and what was wrong with the server afterwards."""
        self.seen[way] = seen
        self.faults += [said for said in (fault(self.case, seen, way), f"{way}: {more}" if more else "") if said]


@dataclass
class Servers:
    """One server at a time; the next one is started when one is not well any more."""

    start: Callable[[], AbstractContextManager[Running]]
    _stack: ExitStack = field(default_factory=ExitStack)
    _running: Running | None = None

    def well(self) -> Running:
        """The server that runs."""
        self._running = self._running or self._stack.enter_context(self.start())
        return self._running

    def stop(self) -> None:
        """End it."""
        self._stack.close()
        self._running = None


def run(
    shop: Shop,
    cases: Sequence[Case],
    folder: Path,
    before: Mapping[str, Any] = MappingProxyType({"trials": (), "seconds": 0}),
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
    say: Say = print,
) -> dict[str, Any]:
    """All cases by all ways in, a handful at a time; the report, which goes on from that of other cases.

    ``keep`` gets the report behind each handful.
    """
    started = time.monotonic()
    watched = folder / "watched"
    watched.mkdir()
    trials = [
        Trial(case=case, folder=folder / "spoiled" / _name(i, case), seen={}, faults=[]) for i, case in enumerate(cases)
    ]
    adapters = [f"{name}={folders[0]}" for name, folders in {**shop.specialists, **shop.conventional}.items()]
    servers = Servers(lambda: running(shop.base, adapters, folder, "--adapter-dir", str(watched)))
    rows = list(before["trials"])
    report = _report(rows, before["seconds"])
    try:
        for first in range(0, len(trials), AT_ONCE):
            some = trials[first : first + AT_ONCE]
            _by_commands(shop, some)
            _over_http(servers, some)
            _by_watcher(servers, watched, [trial for trial in some if trial.case.whole])
            rows += map(_as_json, some)
            seconds = round(time.monotonic() - started)
            say(f"{len(rows)} cases: {sum(bool(row['faults']) for row in rows)} with faults, {seconds} s")
            report = _report(rows, before["seconds"] + seconds)
            keep(report)
    finally:
        servers.stop()
    return report


def _name(number: int, case: Case) -> str:
    return f"{number}-{re.sub(r'[^a-zA-Z0-9]+', '-', case.name)[:80]}"


def _sound(shop: Shop, case: Case) -> Path:
    return shop.specialists["sql"][0] if case.kind == ICARUS else shop.conventional["plain"][0]


def _by_commands(shop: Shop, trials: Sequence[Trial]) -> None:
    for trial in trials:
        trial.case.make(_sound(shop, trial.case), trial.folder)
        for way, ask in (("verify", surfaces.verify), ("start", surfaces.plan)):
            trial.note(way, ask(trial.folder, shop.base))
        if trial.case.name in STARTED:
            trial.note("real start", _real_start(shop, trial.folder))


def _real_start(shop: Shop, folder: Path) -> Seen:
    """``icarus serve`` as a user calls it; it must end by itself, soon, with one sentence on standard error."""
    words = [sys.executable, "-m", "icarus.cli", "serve", str(shop.base), "--adapters", f"x={folder}", "--port", "0"]
    started = time.monotonic()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=surfaces.PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return Seen(BROKEN, "it started", time.monotonic() - started)
    if done.returncode != 2 or len(done.stderr.splitlines()) != 1:
        return Seen(BROKEN, f"exit status {done.returncode}: {done.stderr[-300:]}", time.monotonic() - started)
    return Seen(REFUSED, done.stderr, time.monotonic() - started)


def _over_http(servers: Servers, trials: Sequence[Trial]) -> None:
    for trial in trials:
        server = servers.well()
        seen = server.load(f"x{trial.folder.name}", trial.folder)
        problem = server.disturbed()
        trial.note("http", seen, problem)
        if problem:
            servers.stop()


def _by_watcher(servers: Servers, watched: Path, trials: Sequence[Trial]) -> None:
    """All of them at once."""
    if not trials:
        return
    server = servers.well()
    folders = [trial.folder.rename(watched / trial.folder.name) for trial in trials]
    seen = server.watched(folders, WATCH_SECONDS)
    problem = server.disturbed()
    for trial, folder in zip(trials, folders, strict=True):
        trial.note("watcher", seen.get(folder.name, Seen(BROKEN, "nothing was heard of it", WATCH_SECONDS)))
        shutil.rmtree(folder)
    if problem:
        trials[0].faults.append(f"watcher: one of {len(trials)} from here on: {problem}")
        servers.stop()


def _sentence(trial: Trial) -> str:
    """What a client is told, or a user at the start."""
    said = next((trial.seen[way].said for way in ("http", "start") if trial.seen[way].outcome == REFUSED), "")
    return said.replace(str(trial.folder), "<path>").strip()[:200]


def _as_json(trial: Trial) -> dict[str, Any]:
    return {
        "case": trial.case.name,
        "expected": trial.case.expected.value,
        "seen": {way: seen.outcome for way, seen in trial.seen.items()},
        "said": _sentence(trial),
        "faults": trial.faults,
    }


def _report(trials: Sequence[dict[str, Any]], seconds: int) -> dict[str, Any]:
    return {
        "faults": sum(len(trial["faults"]) for trial in trials),
        "cases": len(trials),
        "expected": dict(Counter(trial["expected"] for trial in trials)),
        "outcomes": dict(
            sorted(Counter(f"{way} {got}" for trial in trials for way, got in trial["seen"].items()).items())
        ),
        "seconds": seconds,
        "trials": list(trials),
    }
