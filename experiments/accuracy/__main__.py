"""``python -m experiments.accuracy``: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.accuracy import driver, plan, settings, work
from icarus.errors import InputError


def main() -> int:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m experiments.accuracy", description=__doc__)
    parser.add_argument("settings", type=Path, help="a YAML file beside this script")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and adapters; may be kept")
    parser.add_argument("--results", type=Path, default=Path("results/accuracy"), help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores (default: 1)")
    parser.add_argument(
        "--tasks", nargs="+", help="these alone, so that several machines share the work (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="say what would be run next, and run nothing")
    options = parser.parse_args()
    try:
        chosen = settings.read(options.settings, options.tasks)
        place = work.Place(chosen, options.data, options.work, options.results / chosen.name)
        if options.list:
            for wanted in plan.wanted(chosen, place.loss):
                print(wanted.cell.name, "scored" if wanted.scored else "", "" if place.done(wanted) else "(missing)")
            return 0
        return driver.run(place, options.jobs)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
