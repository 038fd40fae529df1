"""The command ``icarus``. A command's module is imported when the command is called, and not before.

Each module has ``add_arguments(parser)`` and ``run(options)``, which returns a report for ``--json`` or nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from icarus import arguments
from icarus.errors import CheckFailed, IcarusError, InputError


@dataclass(frozen=True)
class Command:
    """A row of the table of commands."""

    help: str
    module: str
    extra: str = ""
    """The optional dependencies that it needs."""


@dataclass(frozen=True)
class Group:
    """A command that has commands of its own."""

    help: str
    metavar: str
    commands: Mapping[str, Command]


COMMANDS: dict[str, Command | Group] = {
    "demo": Command("three specialists take turns in one context, beside the conventional way", "icarus.demo"),
    "train": Command("train one specialist (icarus train --help lists the flags)", "icarus.train.run", extra="train"),
    "distill": Command(
        "make a specialist of a conventional adapter (icarus distill --help lists the flags)",
        "icarus.train.distill",
        extra="train",
    ),
    "eval": Command("score a base model and adapters on the same items", "icarus.evaluate.command", extra="eval"),
    "serve": Command(
        "serve many specialists from one cache with vLLM (icarus serve --help)", "icarus.vllm.server.serve"
    ),
    "generate": Command("run a list of turns in one context", "icarus.turns"),
    "chat": Command("talk to several specialists in one context", "icarus.chat"),
    "verify": Command("check that an adapter is safe to share a cache with; exit status 0 if it is", "icarus.verify"),
    "base": Command("print the folder of a base model", "icarus.base_model"),
    "specialists": Command("print the shipped specialists, one name=folder a line", "icarus.shipped_specialists"),
    "bench": Group(
        "benchmarks of ICaRus beside conventional LoRA",
        metavar="WHAT",
        commands={
            "decode": Command("one decode step beside conventional LoRA's, in process", "icarus.bench.decode"),
            "train": Command("one training step beside conventional LoRA's", "icarus.bench.train"),
            "agents": Command(
                "workflows of agents on served models, each system beside the others",
                "icarus.bench.agents.command",
                extra="bench",
            ),
        },
    ),
}


_SPINS = "10000"
"""Turns of the loop in which a thread of GNU's OpenMP waits for work before it sleeps. The default, 300,000, takes the
cores from other processes for milliseconds at a time (docs/serve.md has figures)."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failed check or an unexpected error, 2 for bad input."""
    options = argparse.Namespace(debug=False)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for a terminal
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # read once, when torch loads the library
    try:
        _parser().parse_args(words, options)
        _run(options)
        sys.stdout.flush()
        return 0
    except IcarusError as error:
        if options.debug:
            raise
        print(f"icarus: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            raise
        print(f"icarus: {type(error).__name__}: {error} (icarus --debug ... shows the traceback)", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> None:
    try:
        report = options.run(options)
    except CheckFailed as failure:
        _write(failure.report, options)
        raise
    _write(report, options)


def _write(report: Mapping[str, Any] | None, options: argparse.Namespace) -> None:
    target: str | None = getattr(options, "json", None)
    if report is not None and target:
        arguments.write_json(report, target)


# ------------------------------------------------------------------------------------------------- the parsers


class _CommandParser(arguments.Parser):
    """The parser of one command, which its module completes when the command is called."""

    def __init__(self, *, command: Command | None = None, **options: Any) -> None:
        super().__init__(**options)
        # The same flag stands in front of the command; without a default its value there is kept.
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._command:
            with self._naming_extra(self._command.extra):
                module = import_module(self._command.module)
            module.add_arguments(self)
            self.set_defaults(run=self._naming_extra(self._command.extra)(module.run))
        return super().parse_known_args(args, namespace)

    @contextmanager
    def _naming_extra(self, extra: str) -> Iterator[None]:
        """What is missing may be imported with the command's module, or when it is used."""
        try:
            yield
        except ModuleNotFoundError as error:
            if not extra:
                raise
            raise InputError(
                f"{self.prog} needs more packages ({error.name}); run: pip install 'icarus-llm[{extra}]'."
            ) from error


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="icarus", description="Many specialists, one KV cache (arXiv 2603.13281).")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    _add_commands(parser, "COMMAND", COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, metavar: str, commands: Mapping[str, Command | Group]) -> None:
    parsers = parser.add_subparsers(required=True, metavar=metavar, parser_class=_CommandParser)
    for name, entry in commands.items():
        if isinstance(entry, Group):
            group = parsers.add_parser(name, help=entry.help, description=entry.help)
            _add_commands(group, entry.metavar, entry.commands)
        else:
            parsers.add_parser(name, help=entry.help, description=entry.help, command=entry)


if __name__ == "__main__":
    sys.exit(main())
