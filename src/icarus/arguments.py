"""What the commands' arguments have in common: a parser whose errors are ours, types, and the report of ``--json``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from icarus import atomic
from icarus.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError, and that can leave flags which it does not know to another program."""

    _passes_on = False
    _help: Callable[[], str] | None = None

    def pass_on(self, help: Callable[[], str] | None = None) -> None:
        """Leave what is unknown in ``options.rest``, in order, and all words that were given in ``options.words``.

        ``help`` gives the text of ``--help`` in place of this parser's own.
        """
        self._passes_on, self._help = True, help
        self.allow_abbrev = False  # an abbreviation may be a flag of the other program

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ``argparse`` has it; what is unknown is an error or, after ``pass_on``, a part of the options."""
        options, rest = super().parse_known_args(args, namespace)
        if self._passes_on:
            options.words, options.rest, rest = args, rest, []
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return options, []

    def format_help(self) -> str:
        """The text of ``--help``."""
        return self._help() if self._help else super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raises:
        InputError: always.
        """
        raise InputError(f"{message}; see {self.prog} --help.")


def positive_int(text: str) -> int:
    """The type of an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return int(text)


class NamedPaths(argparse.Action):
    """Collects NAME=PATH, one word or several at a time, into ``{name: path}``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Called by ``argparse`` with the words of one flag."""
        paths: dict[str, str] = dict(getattr(namespace, self.dest))  # a copy, because the default is shared
        for word in [values] if isinstance(values, str) else values or ():
            name, equals, path = word.partition("=")
            if not (name and equals and path):
                raise argparse.ArgumentError(self, f"{word!r} is not NAME=PATH")
            if name in paths:
                raise argparse.ArgumentError(self, f"{name!r} is given twice; give each specialist its own name")
            paths[name] = path
        setattr(namespace, self.dest, paths)


def add_json(
    parser: argparse.ArgumentParser, help_: str = "write the report as JSON; - prints it as the last line"
) -> None:
    """Add ``--json``, which the command line acts on for every command that returns a report."""
    parser.add_argument("--json", metavar="FILE", help=help_)


def read_yaml(file: Path, what: str) -> dict[str, Any]:
    """The keys of a YAML (or JSON) file; ``what`` it should hold is named in errors.

    Raises:
        InputError: it cannot be read, or holds no keys.
    """
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The {what} {file} cannot be read ({error.strerror}); name a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML ({' '.join(str(error).split())}); correct it.") from error
    except RecursionError as error:
        raise InputError(f"{file} is nested too deeply to be read; correct it.") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is no {what}; give it as key: value on each line.")
    return values


def write_json(report: Mapping[str, Any], target: str) -> None:
    """Write a report to a file in one step, indented, or print it as one line for ``-``.

    Raises:
        InputError: the file cannot be written.
    """
    if target == "-":
        print(json.dumps(report, ensure_ascii=False), flush=True)
        return
    try:
        atomic.write_text(Path(target), json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"The report cannot be written to {target} ({error.strerror}); name another file.") from error
