"""What a user told vLLM: the flags behind ours on the command line, and vLLM's ``--config`` file."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from icarus.errors import InputError


def given(words: Iterable[str]) -> set[str]:
    """Names of the flags in vLLM's words and in its ``--config`` file, spelled as in ``max-loras``.

    Raises:
        InputError: the file cannot be read.
    """
    listed = list(words)
    names = {word[2:].partition("=")[0].replace("_", "-") for word in listed if word.startswith("--")}
    if "-dp" in listed:
        names.add("data-parallel-size")
    if "config" in names:
        names |= _config(listed).keys()
    return names | {name.removeprefix("no-") for name in names}


def values(words: Sequence[str], name: str, *short: str) -> list[str]:
    """What the user gave for a flag: on the command line, else in the ``--config`` file; nothing if neither has it.

    ``short`` are other spellings of it on the command line, as in ``-asc``.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", *short, dest="values", nargs="*")
    listed: list[str] | None = parser.parse_known_args(list(words))[0].values
    if listed is None:
        value = _config(words).get(name)
        listed = [] if value is None else [str(item) for item in (value if isinstance(value, list) else [value])]
    return listed


def value(words: Sequence[str], name: str, default: str, *short: str) -> str:
    """The one value of a flag, or ``default``, which is vLLM's own."""
    return (values(words, name, *short) or [default])[0]


def number(words: Sequence[str], name: str, default: int, *short: str) -> int:
    """The same for an integer.

    Raises:
        InputError: it is something else.
    """
    text = value(words, name, str(default), *short)
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"--{name} {text!r} must be an integer.") from error


def address(words: Sequence[str]) -> tuple[str, int]:
    """Host and port that the user gave, or vLLM's own."""
    return value(words, "host", "localhost"), number(words, "port", 8000)


def several_servers(words: Sequence[str]) -> bool:
    """Whether the user asked for more than one API server; vLLM then loads no adapters at run time."""
    return number(words, "api-server-count", 0, "-asc") > 1


def _config(words: Sequence[str]) -> Mapping[str, Any]:
    """The flags in vLLM's ``--config`` file, spelled as in ``max-loras``."""
    import yaml

    paths = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    paths += [value for word, value in pairwise(words) if word == "--config"]
    if not paths:
        return {}
    try:
        content = yaml.safe_load(Path(paths[0]).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {paths[0]} cannot be read ({error}); give vLLM a YAML file of flags.") from error
    return {str(key).replace("_", "-"): value for key, value in content.items()} if isinstance(content, dict) else {}
