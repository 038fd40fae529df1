"""Recorded trajectories from a local file: JSON lines, gzipped or not, a run each, with its steps.

A run is an object with ``steps``, a list of objects with ``thought``, ``action``, ``argument`` and ``observation``
(text; any may be missing), and with ``question``; ``system`` and ``reflections`` stand before the question. Published
recordings of ReAct, Reflexion and plan-act-reflect agents have this shape.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from icarus.bench.agents.workloads import Step, Tokens, Trajectory
from icarus.errors import InputError

Encode = Callable[[str], Tokens]


def read(file: Path, encode: Encode, limit: int, longest: int) -> list[Trajectory]:
    """The first ``limit`` runs of up to ``longest`` tokens with at least one step.

    Raises:
        InputError: the file cannot be read, a line has another shape, or no run fits.
    """
    fitting: list[Trajectory] = []
    for number, line in _lines(file):
        trajectory = _trajectory(line, encode, f"{file}, line {number}")
        if trajectory.steps and _length(trajectory) <= longest:
            fitting.append(trajectory)
        if len(fitting) == limit:
            break
    if not fitting:
        raise InputError(f"{file} has no run with steps of up to {longest} tokens; give another --trajectories.")
    return fitting


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    opened: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as handle:
            yield from ((number, line) for number, line in enumerate(handle, 1) if line.strip())
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{file} cannot be read ({error}); give a file of JSON lines to --trajectories.") from error


def _trajectory(line: str, encode: Encode, place: str) -> Trajectory:
    try:
        run = json.loads(line)
        steps = tuple(_step(step, encode) for step in run["steps"])
        parts = [run.get("system"), *(run.get("reflections") or ()), run["question"]]
        prompt = "\n".join(part for part in parts if part)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: no run with 'question' and 'steps' ({type(error).__name__}: {error}).") from error
    return Trajectory(encode(prompt + "\n"), steps)


def _step(step: dict[str, Any], encode: Encode) -> Step:
    def text(*fields: str) -> Tokens:
        words = " ".join(str(step[field]) for field in fields if step.get(field))
        return encode(words + "\n") if words else ()

    return Step(text("thought"), text("action", "argument"), text("observation"))


def _length(trajectory: Trajectory) -> int:
    steps = sum(len(step.thought) + len(step.action) + len(step.observation) for step in trajectory.steps)
    return len(trajectory.prompt) + steps
