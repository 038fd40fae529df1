"""The command line of ``icarus bench agents``, and what it leaves in its folder: report, tables and plots."""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from icarus import arguments
from icarus.bench import measure
from icarus.bench.agents import records, settings, tables
from icarus.bench.agents.records import Run
from icarus.bench.agents.report import Protocol, Report
from icarus.bench.agents.settings import PROFILES, Settings
from icarus.errors import IcarusError, InputError


def add_arguments(parser: arguments.Parser) -> None:
    """The command's own flags; those of the settings are left to their own parser, which ``--help`` has below."""
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="settings to start from (default: cpu)")
    parser.add_argument(
        "--quick", action="store_const", dest="profile", const="quick", help="--profile quick: the most telling runs"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON of settings in place of the profile's; flags win"
    )
    parser.add_argument("--output", metavar="DIR", help="raw runs, report and plots (default: bench-agents...)")
    parser.add_argument("--redraw", action="store_true", help="only make the report of --output again")
    arguments.add_json(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _settings_parser(usage=argparse.SUPPRESS, add_help=False).format_help()
    parser.pass_on()


class _SettingsParser(HfArgumentParser, arguments.Parser):
    """Transformers' parser with our errors."""


def _settings_parser(**options: Any) -> Any:
    """A flag for each setting, from its declaration."""
    parser: Any = _SettingsParser  # whose constructor wants a type that no dataclass has
    return parser(Settings, prog="icarus bench agents", **options)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, or make the report of an earlier command again; returns the report."""
    kind = "" if options.profile == "cpu" else f"-{options.profile}"
    output = Path(options.output or f"bench-agents{kind}")  # a folder for each profile, as runs of two do not mix
    chosen = settings_of(options)
    if options.redraw and (useless := options.rest[:1] or ["--config"] * bool(options.config)):
        raise InputError(f"--redraw draws what was measured, where {useless[0]} has no effect; take one of them out.")
    report = redraw(output) if options.redraw else compare(chosen, output)
    return report.as_json()


def settings_of(options: argparse.Namespace) -> Settings:
    """The profile's, with those of ``--config`` and then of flags in place of its own.

    Raises:
        InputError: a value is wrong, or two do not go together.
    """
    parser = _settings_parser()
    if options.profile != "gpu":
        parser.set_defaults(dtype=measure.served_dtype())
    parser.set_defaults(**settings.profile(options.profile))
    if options.config:
        parser.set_defaults(**settings.read(Path(options.config)))
    chosen: Settings = parser.parse_args_into_dataclasses(options.rest, look_for_args_file=False)[0]
    return chosen


def compare(chosen: Settings, output: Path) -> Report:
    """Measure what is not measured yet, write the report to ``output`` and return it.

    Raises:
        InputError: the settings cannot run.
        IcarusError: a server failed; the report is written.
    """
    from icarus.bench.agents.sweep import Sweep  # the extra "bench"; help and --redraw do without

    started, interrupt = time.monotonic(), signal.default_int_handler  # SIGTERM does what Ctrl-C does
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, interrupt))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="icarus-bench-"))
        sweep = Sweep(chosen, output, Path(scratch))
        print(tables.protocol(sweep.protocol), flush=True)
        before = len(sweep.records.runs)
        try:
            failures = sweep.measure()
        except KeyboardInterrupt:
            write(output, sweep.protocol, sweep.records.runs, ["The command was interrupted."])
            raise
    took = round((time.monotonic() - started) / 60, 1)
    sweep.protocol["command"] = {"took (minutes, starts included)": took, "runs measured before it": before}
    report = write(output, sweep.protocol, sweep.records.runs, failures)
    if failures:
        raise IcarusError(
            f"{len(failures)} server(s) failed, as said above and in {output}/report.md; what was measured is there, "
            "and the same command resumes with the rest."
        )
    return report


def redraw(output: Path) -> Report:
    """The report again from what an earlier command measured; nothing is started.

    Raises:
        InputError: ``output`` holds no runs, or those of another version.
    """
    try:
        before = json.loads((output / "report.json").read_text(encoding="utf-8"))
        protocol, failures = before["protocol"], before["failures"]
        known = Settings(**protocol["settings"]).as_dict() == protocol["settings"]
        runs = records.read(output / records.FILE)[1] if known else []
    except (OSError, ValueError) as error:
        raise InputError(f"{output} holds no report to draw again ({error}); name the --output of a run.") from error
    except (KeyError, TypeError, InputError):
        known = False
    if not known:
        raise InputError(
            f"{output} was measured by another version of icarus; draw it with that version, or measure it again with "
            "another --output."
        )
    return write(output, protocol, runs, failures)


def write(output: Path, protocol: Protocol, runs: Sequence[Run], failures: Sequence[str] = ()) -> Report:
    """Report, tables and plots into ``output``; without matplotlib no plots, and a line that says so."""
    report = Report.of(protocol, runs, failures)
    try:
        from icarus.bench.agents import plots

        pictures = plots.draw(report, runs, output)
    except ImportError:
        pictures = []
        print("No plots, as matplotlib is missing; run: pip install 'icarus-llm[bench]', and again with --redraw.")
    (output / "report.json").write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    (output / "report.md").write_text(tables.markdown(report, pictures), encoding="utf-8")
    tables.show(report)
    print(f"{output}: report.md, report.json, {', '.join(f'{name}.png' for name in pictures) or 'no plots'}")
    return report
