"""``python -m benchmarks.soak``: see ``--help``."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icarus import arguments, packaged_model


def main() -> int:
    """Run one part; the exit status is 1 where it found a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parts = parser.add_subparsers(required=True, metavar="PART", dest="part")
    load = parts.add_parser("load", help="random load on a tiny model, compared with contexts")
    load.add_argument("--requests", type=int, default=10_000)
    load.add_argument("--swaps", type=int, default=1_000)
    real = parts.add_parser(
        "real", help="random load on the packaged model behind icarus serve, compared with contexts"
    )
    real.add_argument("--requests", type=int, default=300)
    adapters = parts.add_parser("adapters", help="malformed adapters by every way in")
    adapters.add_argument("--only", default="", help="a regular expression for the names of cases")
    adapters.add_argument("--every", type=int, default=1, metavar="N", help="every Nth case, and those of real starts")
    bodies = parts.add_parser("bodies", help="malformed requests from schemathesis, compared with stock vLLM")
    bodies.add_argument(
        "--schemathesis", default="schemathesis", metavar="PATH", help="the command, of any environment"
    )
    bodies.add_argument("--seconds", type=int, default=600, help="of each of two runs")
    kills = parts.add_parser("kills", help="killed processes, a full disk, vanished folders: what users see")
    for part in (adapters, kills):
        part.add_argument("--most", type=int, help="so many at most, of those that the report has not yet")
    replay = parts.add_parser("replay", help="one job again, as a failure left it")
    replay.add_argument("job", type=Path)
    for part in (load, real, adapters, bodies, kills, replay):
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--folder", type=Path, help="for logs and failures (default: a temporary one)")
        part.add_argument("--json", type=Path, help="file for the report; an interrupted run goes on from it")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # servers end with us
    folder = options.folder or Path(tempfile.mkdtemp(prefix="icarus-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    runs = {"load": _load, "real": _real, "adapters": _adapters, "bodies": _bodies, "kills": _kills, "replay": _replay}
    report = {**_settings(options), **runs[options.part](options, folder)}
    if options.json:
        arguments.write_json(report, str(options.json))
    brief = {name: part for name, part in report.items() if name not in ("rounds", "trials", "failed")}
    print(json.dumps(brief, indent=1))
    return 1 if report["faults"] else 0


def _load(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.soak import shop
    from benchmarks.soak.load import Soak
    from benchmarks.soak.reference import Reference

    before = _earlier(options).get("rounds", ())
    with tempfile.TemporaryDirectory() as stock:
        tiny = shop.tiny(Path(stock))
        soak = Soak(shop=tiny, right=Reference(tiny), folder=folder)
        return soak.run(options.seed, options.requests, options.swaps, before, _keeper(options))


def _earlier(options: argparse.Namespace) -> dict[str, Any]:
    """The report that an interrupted run left; empty if there is none."""
    if not (options.json and options.json.exists()):
        return {}
    earlier: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8"))
    if (seed := earlier["settings"]["seed"]) != options.seed:
        raise SystemExit(f"{options.json} is of seed {seed}; name another file, or that seed.")
    return earlier


def _keeper(options: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """Writes what there is of a report, in case that the run is interrupted."""
    settings = _settings(options)

    def keep(report: dict[str, Any]) -> None:
        if options.json:
            arguments.write_json({**settings, **report}, str(options.json))

    return keep


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a report says of where it was measured."""
    from icarus.bench import measure

    given = {name: value for name, value in vars(options).items() if isinstance(value, int | str)}
    return {"settings": measure.settings(**given)}


def _real(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.soak import real, shop
    from benchmarks.soak.reference import Reference
    from icarus import base_model

    tokenizer = base_model.load(packaged_model.PREPARED)[1]
    with tempfile.TemporaryDirectory() as stock:
        packaged = shop.packaged(Path(stock))
        return real.run(packaged, lambda: Reference(packaged), tokenizer, folder, options.requests, options.seed)


def _adapters(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.soak import adapters, malformed, shop

    before = _earlier(options) or {"trials": [], "seconds": 0}
    tried = {trial["case"] for trial in before["trials"]}
    cases = [case for case in malformed.cases(options.seed) if re.search(options.only, case.name)]
    cases = [case for n, case in enumerate(cases) if n % options.every == 0 or case.name in adapters.STARTED]
    cases = [case for case in cases if case.name not in tried][: options.most]
    with tempfile.TemporaryDirectory() as stock:
        report = adapters.run(shop.tiny(Path(stock)), cases, folder, before, _keeper(options))
    for trial in report["trials"]:
        for fault in trial["faults"]:
            print(f"{trial['case']} ({trial['expected']}): {fault}")
    return report


def _bodies(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.soak import bodies, shop

    with tempfile.TemporaryDirectory() as stock:
        tiny = shop.tiny(Path(stock))
        return bodies.run(tiny, options.schemathesis, folder, options.seconds, options.seed)


def _kills(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.soak import kills, shop

    with tempfile.TemporaryDirectory() as stock:
        before = _earlier(options).get("accidents", ())
        return kills.run(shop.tiny(Path(stock)), folder, before, options.most, _keeper(options))


def _replay(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.soak import shop
    from benchmarks.soak.judge import Judge
    from benchmarks.soak.load import UNDER_WAY, faults_of, run_job
    from benchmarks.soak.reference import Reference

    with tempfile.TemporaryDirectory() as stock:
        tiny = shop.tiny(Path(stock))
        job = json.loads(options.job.read_text(encoding="utf-8"))
        job["engine"]["model"] = str(tiny.base)
        result = run_job(tiny, job, folder / "engine.log")
        judge = Judge(Reference(tiny), UNDER_WAY if job["engine"]["async_scheduling"] else 0)
        return {"faults": [vars(fault) for fault in faults_of(result, judge)], "summary": result["summary"]}


if __name__ == "__main__":
    sys.exit(main())
