"""Recorded trajectories from a local file: JSON lines, gzipped or not, a run each, with its steps.

A run is an object with ``steps``, a list of objects with ``thought``, ``action``, ``argument`` and ``observation``
(text; any may be missing), and with ``question``; ``system`` and ``reflections`` stand before the question. Published
recordings of ReAct, Reflexion and plan-act-reflect agents have this shape.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from icarus.bench.agents.workloads import Tokens, Trajectory, replay
from icarus.errors import InputError

Encode = Callable[[str], Tokens]


def read(file: Path, encode: Encode, limit: int, longest: int, reflection: int) -> list[Trajectory]:
    """The first ``limit`` runs with at least one step and, a reflection included, up to ``longest`` tokens.

    Raises:
        InputError: the file cannot be read, a line has another shape, or no run fits.
    """
    read = (_trajectory(line, encode, f"{file}, line {number}") for number, line in _lines(file))
    fitting = (run for run in read if run.steps and replay(run, reflection).longest <= longest)
    if not (runs := [*islice(fitting, limit)]):
        raise InputError(f"{file} has no run with steps of up to {longest} tokens; give another --trajectories.")
    return runs


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    opened: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as handle:
            yield from ((number, line) for number, line in enumerate(handle, 1) if line.strip())
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{file} cannot be read ({error}); give a file of JSON lines to --trajectories.") from error


def _trajectory(line: str, encode: Encode, place: str) -> Trajectory:
    def text(step: dict[str, Any], *fields: str) -> Tokens:
        words = " ".join(str(step[field]) for field in fields if step.get(field))
        return encode(words + "\n") if words else ()

    try:
        run = json.loads(line)
        steps = [(text(s, "thought"), text(s, "action", "argument"), text(s, "observation")) for s in run["steps"]]
        parts = [run.get("system"), *(run.get("reflections") or ()), run["question"]]
        prompt = "\n".join(part for part in parts if part)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: no run with 'question' and 'steps' ({type(error).__name__}: {error}).") from error
    return Trajectory(encode(prompt + "\n"), steps)
