"""The command line of ``icarus bench agents``, and what it leaves in its folder: report, tables and plots."""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from icarus import arguments
from icarus.bench import measure
from icarus.bench.agents import fields, records, tables
from icarus.bench.agents.records import Run
from icarus.bench.agents.report import Protocol, Report
from icarus.bench.agents.settings import PROFILES, QUICK, Settings
from icarus.bench.agents.sweep import RUNS, Sweep
from icarus.errors import IcarusError, InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags; a setting that is not given is the profile's."""
    parser.add_argument("--profile", choices=sorted(PROFILES), default="cpu", help="settings to start from")
    parser.add_argument("--quick", action="store_true", help="the most telling runs alone")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON of settings in place of the profile's; flags win"
    )
    parser.add_argument("--output", metavar="DIR", help="raw runs, report and plots (default: bench-agents...)")
    parser.add_argument("--redraw", action="store_true", help="only make the report of --output again")
    arguments.add_json(parser)
    fields.add_flags(parser, Settings())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, or make the report of an earlier command again; returns the report."""
    output = output_of(options)
    report = redraw(output) if options.redraw else compare(settings_of(options), output)
    return report.as_json()


def output_of(options: argparse.Namespace) -> Path:
    """Where runs are kept: by default a folder for each profile, as runs of two do not mix."""
    kind = "-quick" if options.quick else "" if options.profile == "cpu" else f"-{options.profile}"
    return Path(options.output or f"bench-agents{kind}")


def settings_of(options: argparse.Namespace) -> Settings:
    """The profile's, with those of ``--config`` and then of flags in place of its own.

    Raises:
        InputError: a value is wrong, or two do not go together.
    """
    if options.quick and options.profile != "cpu":
        raise InputError(
            "--quick is a part of the CPU profile; for another one give --models, --workloads and --rates."
        )
    profile = QUICK if options.quick else PROFILES[options.profile]
    if options.profile == "cpu":
        profile = replace(profile, dtype=measure.served_dtype())
    configured = fields.changed(profile, _read(options.config)) if options.config else profile
    return fields.changed(configured, fields.given(options))


def _read(file: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give a YAML file to --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML ({' '.join(str(error).split())}); mend it.") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no settings; give one as name: value on each line.")
    return values


def compare(settings: Settings, output: Path) -> Report:
    """Measure what is not measured yet, write the report to ``output`` and return it.

    Raises:
        InputError: the settings cannot run.
        IcarusError: a server failed; the report is written.
    """
    with tempfile.TemporaryDirectory(prefix="icarus-bench-") as scratch, _interrupted_by_sigterm():
        sweep, started = Sweep(settings, output, Path(scratch)), time.monotonic()
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
        missing = Settings().as_dict().keys() - protocol["settings"].keys()
        runs = records.read(output / RUNS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output} holds no report to draw again ({error}); name the --output of a run.") from error
    if missing:
        raise InputError(
            f"{output} was measured by another version of icarus, whose runs had no {', '.join(sorted(missing))}; "
            "draw it with that version, or measure it again."
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
