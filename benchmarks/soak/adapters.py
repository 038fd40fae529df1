"""All malformed adapters by every way in, and the server alive after each."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

AT_ONCE = 40
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


def run(
    shop: Shop,
    cases: Sequence[Case],
    folder: Path,
    before: Mapping[str, Any] = MappingProxyType({"trials": (), "seconds": 0}),
    say: Say = print,
) -> dict[str, Any]:
    """All cases by all ways in; the report, which goes on from that of other cases."""
    started = time.monotonic()
    spoiled = folder / "spoiled"
    trials = [Trial(case=case, folder=spoiled / _name(i, case), seen={}, faults=[]) for i, case in enumerate(cases)]
    for trial in trials:
        trial.case.make(_sound(shop, trial.case), trial.folder)
        for way, ask in (("verify", surfaces.verify), ("start", surfaces.plan)):
            trial.note(way, ask(trial.folder, shop.base))
    say(f"{len(trials)} cases by commands: {_faulty(trials)} with faults, {time.monotonic() - started:.0f} s")
    for trial in trials:
        if trial.case.name in STARTED:
            trial.note("real start", _real_start(shop, trial.folder))
    watched = folder / "watched"
    watched.mkdir()
    adapters = [f"{name}={folders[0]}" for name, folders in {**shop.specialists, **shop.conventional}.items()]
    pending = list(trials)
    while pending:  # a server that died or hangs is started anew
        with running(shop.base, adapters, folder, "--adapter-dir", str(watched)) as server:
            pending = _over_http(server, pending)
    say(f"over HTTP: {_faulty(trials)} with faults, {time.monotonic() - started:.0f} s")
    pending = [trial for trial in trials if trial.case.whole]
    while pending:
        with running(shop.base, adapters, folder, "--adapter-dir", str(watched)) as server:
            pending = _by_watcher(server, watched, pending)
    say(f"by the watcher: {_faulty(trials)} with faults, {time.monotonic() - started:.0f} s")
    seconds = before["seconds"] + round(time.monotonic() - started)
    return _report([*before["trials"], *map(_as_json, trials)], seconds)


def _name(number: int, case: Case) -> str:
    return f"{number}-{re.sub(r'[^a-zA-Z0-9]+', '-', case.name)[:80]}"


def _sound(shop: Shop, case: Case) -> Path:
    return shop.specialists["sql"][0] if case.kind == ICARUS else shop.conventional["plain"][0]


def _faulty(trials: Sequence[Trial]) -> int:
    return sum(bool(trial.faults) for trial in trials)


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


def _over_http(server: Running, trials: list[Trial]) -> list[Trial]:
    """The cases that are left when the server is not well any more."""
    for index, trial in enumerate(trials):
        seen = server.load(f"x{index}", trial.folder)
        problem = server.disturbed()
        trial.note("http", seen, problem)
        if problem:
            return trials[index + 1 :]
    return []


def _by_watcher(server: Running, watched: Path, trials: list[Trial]) -> list[Trial]:
    """A handful at a time; the cases that are left when the server is not well any more."""
    for start in range(0, len(trials), AT_ONCE):
        some = trials[start : start + AT_ONCE]
        folders = [trial.folder.rename(watched / trial.folder.name) for trial in some]
        seen = server.watched(folders, WATCH_SECONDS)
        problem = server.disturbed()
        for trial, folder in zip(some, folders, strict=True):
            trial.note("watcher", seen.get(folder.name, Seen(BROKEN, "nothing was heard of it", WATCH_SECONDS)))
            shutil.rmtree(folder)
        if problem:
            if len(some) > 1:
                problem = f"one of {len(some)} from here on: {problem}"
            some[0].faults.append(f"watcher: {problem}")
            return trials[start + AT_ONCE :]
    return []


def _as_json(trial: Trial) -> dict[str, Any]:
    return {
        "case": trial.case.name,
        "expected": trial.case.expected.value,
        "seen": {way: seen.outcome for way, seen in trial.seen.items()},
        "said": next((seen.said.strip()[:200] for seen in trial.seen.values() if seen.outcome == REFUSED), ""),
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
