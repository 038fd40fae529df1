"""``python -m experiments.accuracy``: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.accuracy import driver, plan, report, settings, times, work
from icarus.errors import InputError


def main() -> int:
    """Run what is missing, measure step times, or write the report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.accuracy", description=__doc__)
    parser.add_argument("part", choices=["run", "list", "times", "report"], help="list: what would be run next")
    parser.add_argument("settings", type=Path, help="a YAML file beside this script")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and adapters; may be kept")
    parser.add_argument("--results", type=Path, default=Path("results/accuracy"), help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores (default: 1)")
    parser.add_argument(
        "--tasks", nargs="+", help="these alone, so that several machines share the work (default: all)"
    )
    parser.add_argument("--arms", nargs="+", default=["conventional", "icarus"], help="whose steps are timed")
    parser.add_argument("--repeats", type=int, default=9, help="of each arm's step (default: %(default)s)")
    options = parser.parse_args()
    try:
        chosen = settings.read(options.settings, options.tasks)
        place = work.Place(chosen, options.data, options.work / chosen.name, options.results / chosen.name)
        place.results.mkdir(parents=True, exist_ok=True)
        return _PARTS[options.part](place, options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def _list(place: work.Place, options: argparse.Namespace) -> int:
    for wanted in plan.wanted(place.settings, place.loss):
        print(wanted.cell.name, "scored" if wanted.scored else "", "" if place.done(wanted) else "(missing)")
    return 0


def _times(place: work.Place, options: argparse.Namespace) -> int:
    times.run(place, list(dict.fromkeys(task for task, _ in place.settings.pairs)), options.arms, options.repeats)
    return 0


def _report(place: work.Place, options: argparse.Namespace) -> int:
    report.run(place)
    return 0


_PARTS = {
    "run": lambda place, options: driver.run(place, options.jobs),
    "list": _list,
    "times": _times,
    "report": _report,
}


if __name__ == "__main__":
    sys.exit(main())
