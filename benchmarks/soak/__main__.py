"""``python -m benchmarks.soak``: see ``--help``."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> int:
    """Run one part; the exit status is 1 where it found a fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parts = parser.add_subparsers(required=True, metavar="PART", dest="part")
    load = parts.add_parser("load", help="random load on a tiny model, compared with contexts")
    load.add_argument("--requests", type=int, default=10_000)
    load.add_argument("--swaps", type=int, default=1_000)
    adapters = parts.add_parser("adapters", help="malformed adapters by every way in")
    adapters.add_argument("--only", default="", help="a regular expression for the names of cases")
    replay = parts.add_parser("replay", help="one job again, as a failure left it")
    replay.add_argument("job", type=Path)
    for part in (load, adapters, replay):
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--folder", type=Path, help="for logs and failures (default: a temporary one)")
        part.add_argument("--json", type=Path, help="file for the report")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="icarus-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    report = {"load": _load, "adapters": _adapters, "replay": _replay}[options.part](options, folder)
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(
        text if options.part == "replay" else json.dumps({k: v for k, v in report.items() if k != "rounds"}, indent=1)
    )
    return 1 if report["faults"] else 0


def _load(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.soak import shop
    from benchmarks.soak.load import Soak
    from benchmarks.soak.reference import Reference

    with tempfile.TemporaryDirectory() as stock:
        tiny = shop.tiny(Path(stock))
        return Soak(shop=tiny, right=Reference(tiny), folder=folder).run(options.seed, options.requests, options.swaps)


def _adapters(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from benchmarks.soak import adapters, malformed, shop

    cases = [case for case in malformed.cases(options.seed) if re.search(options.only, case.name)]
    with tempfile.TemporaryDirectory() as stock:
        report = adapters.run(shop.tiny(Path(stock)), cases, folder)
    for trial in report["trials"]:
        for fault in trial["faults"]:
            print(f"{trial['case']} ({trial['expected']}): {fault}")
    return report


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
