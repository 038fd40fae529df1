"""``icarus generate``: a JSON list of turns, played in one context.

A turn is {"model": "sql", "append": "text" | "messages": [...], "max_new_tokens": 64, "temperature": 0, "top_p": 1,
"top_k": 0, "stop": [...], "seed": 1}. All keys are optional; without "model" the base model speaks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icarus import arguments, team
from icarus.context import BASE, Specialists
from icarus.errors import InputError

_OPTIONS: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "stop": (str, list),
    "seed": (int,),
}
_KEYS: dict[str, tuple[type, ...]] = {"model": (str,), "append": (str,), "messages": (list,), **_OPTIONS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``icarus generate``."""
    parser.epilog = (
        'A turn is {"model": "sql", "append": TEXT or "messages": [...], "max_new_tokens": 256, "temperature": 0, '
        '"top_p": 1, "top_k": 0, "stop": [...], "seed": 1}. '
        'All keys are optional; without "model" the base model speaks.'
    )
    team.add_arguments(parser)
    parser.add_argument("--turns", required=True, metavar="FILE", help="JSON list of turns; - reads standard input")
    arguments.add_json(parser, "write the figures of all turns as JSON; - prints those of each turn as a line")


def run(options: argparse.Namespace) -> dict[str, Any] | None:
    """Print each turn as it ends: its text or, with ``--json -``, one object a line and no report at the end."""
    script, as_json = read(options.turns), options.json == "-"
    for name in sorted(_speakers(script) - {BASE, *options.adapter}):
        raise InputError(f"{options.turns} names the specialist {name!r}; load it with --adapter {name}=PATH.")
    played = []
    for turn in play(team.load(options), script):
        played.append(turn)
        print(json.dumps(turn, ensure_ascii=False) if as_json else turn["text"], flush=True)
    return None if as_json else {"turns": played}


def read(source: str) -> list[dict[str, Any]]:
    """Read the turns of a file (``-``: standard input) and check them.

    Raises:
        InputError: the file cannot be read, or a turn has an unknown key or a value of the wrong type.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        turns = json.loads(text)
    except OSError as error:
        raise InputError(f"The turns in {source} cannot be read ({error.strerror}); name a JSON file.") from error
    except ValueError as error:
        raise InputError(f"{source} is not JSON ({error}); give a list of turns.") from error
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{source} must hold a non-empty JSON list of turns.")
    for number, turn in enumerate(turns, 1):
        _check(turn, f"turn {number} of {source}")
    return turns


def _check(turn: Any, where: str) -> None:
    if not isinstance(turn, dict):
        raise InputError(f"{where} is not a JSON object; give an object with keys such as 'model' and 'append'.")
    for key, value in turn.items():
        if key not in _KEYS:
            raise InputError(f"{where} has the unknown key {key!r}; the known keys are {', '.join(_KEYS)}.")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise InputError(f"{where}: {key!r} must be {' or '.join(t.__name__ for t in _KEYS[key])}, not {value!r}.")
    if not all(isinstance(stop, str) for stop in turn.get("stop", "")):
        raise InputError(f"{where}: 'stop' must be a text or a list of texts, not {turn['stop']!r}.")
    if "append" in turn and "messages" in turn:
        raise InputError(f"{where} has both 'append' and 'messages'; give one of them.")


def play(specialists: Specialists, turns: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Play turns, as ``read`` checked them, in one context; yields the figures of each as it ends."""
    for name in _speakers(turns):
        specialists.adapter(name)  # refuses an unknown name before anything runs
    context = specialists.context()
    for turn in turns:
        content = turn.get("append") or turn.get("messages")
        if content:
            context.append(content)
        options = {key: turn[key] for key in _OPTIONS if key in turn}
        figures = asdict(context.generate(turn.get("model", BASE), **options))
        yield figures | {"reused_tokens": figures["cached_tokens"]}  # its old name, until 0.3


def _speakers(turns: list[dict[str, Any]]) -> set[str]:
    return {turn.get("model", BASE) for turn in turns}
