"""The command line: ``python -m benchmarks.serve_micro`` from the root of a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import benchmarks.serve_micro
from benchmarks.serve_micro import run
from benchmarks.serve_micro.plan import SYSTEMS
from benchmarks.serve_micro.report import write
from icarus import arguments
from icarus.bench import measure
from icarus.errors import IcarusError


def main(words: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status, 2 for bad input."""
    parser = arguments.Parser(
        prog="python -m benchmarks.serve_micro",
        description=benchmarks.serve_micro.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = arguments.positive_int
    measure.add_arguments(parser, dtype=measure.served_dtype(), repeats=5)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="engines (default: all)")
    parser.add_argument("--starts", type=count, default=1, help="starts of all engines, as two differ (default: 1)")
    parser.add_argument("--prompt-tokens", type=count, default=1000, help="of prefill and chain (default: 1000)")
    parser.add_argument("--steps", type=count, default=32, help="decode steps of each sample (default: 32)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also profile each engine, a text file each")
    try:
        options = parser.parse_args(words)
        report = run.run(
            options.base,
            options.dtype,
            options.repeats,
            starts=options.starts,
            systems=options.systems,
            prompt=options.prompt_tokens,
            steps=options.steps,
            profile=options.profile,
        )
    except IcarusError as error:
        print(f"serve_micro: {error}", file=sys.stderr)
        return error.exit_status
    if options.json == "-":
        arguments.write_json(report, options.json)
    elif options.json:
        write(report, Path(options.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
