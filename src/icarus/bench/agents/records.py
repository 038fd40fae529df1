"""Raw results in a gzipped file of JSON lines: the settings first, then one line for each finished run.

An interrupted command resumes. Settings that give a finished run another meaning are refused.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from icarus import atomic
from icarus.bench.agents.plan import Unit
from icarus.errors import InputError

FILE = "runs.jsonl.gz"
"""In the folder that a command writes to."""

GRID = {"systems", "models", "workloads", "rates", "repeats", "start_seconds"}
"""Settings that only say how many runs there are; they may change between commands that write into one file."""


@dataclass
class CallRecord:
    """One call as the client saw it. Times in seconds; ``start`` counts from the start of the run."""

    workflow: int
    call: int
    model: str
    start: float
    prompt_tokens: int
    ttft: float = 0.0  # until the first generated token
    latency: float = 0.0  # until the last
    itls: list[float] = field(default_factory=list)  # between the chunks of the stream
    output_tokens: int = 0
    cached_tokens: int = 0  # as the server counts them in ``usage``


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a run gave; times in seconds since its start, latencies of workflows since their arrival."""

    duration: float  # from the first arrival to the end of the last call
    arrivals: Sequence[float]  # as they happened
    workflows: Sequence[float]  # from arrival to the end of the last call
    calls: Sequence[CallRecord]
    prompt_tokens_prefilled: int
    cached_tokens: int
    preemptions: int
    kv_usage: Sequence[tuple[float, float]]  # (seconds, share of blocks in use)


@dataclass(frozen=True, kw_only=True)
class Run(Traffic):
    """One finished run."""

    unit: Unit
    kv_tokens: int
    commit: str | None
    peak_memory_mb: int | None  # None where there is no /proc

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """From a line of the file.

        Raises:
            KeyError, TypeError: it has another shape.
        """
        calls = [CallRecord(**call) for call in record["calls"]]
        return cls(**{**record, "unit": Unit(**record["unit"]), "calls": calls})


class Records:
    """The finished runs of one file."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Opens the file, or starts it.

        Raises:
            InputError: the file is of other settings, holds something else, or cannot be written.
        """
        self.file = file
        self.runs: list[Run] = []
        self._settings = {key: value for key, value in settings.items() if key not in GRID}
        try:
            before, self.runs = read(file)
        except (FileNotFoundError, NotADirectoryError):
            self._start()
            return
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} holds no runs of this command; give another --output.") from error
        now = json.loads(json.dumps(self._settings))
        if odd := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            raise InputError(
                f"{file} holds runs with another {', '.join(odd)}: give another --output, or remove that folder."
            )

    def done(self, unit: Unit) -> bool:
        """Whether a run is finished."""
        return any(run.unit == unit for run in self.runs)

    def add(self, run: Run) -> None:
        """Write a finished run."""
        self.runs.append(run)  # first, so that an interrupt cannot leave it out of the report
        self._write()

    def _start(self) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise InputError(f"{self.file} cannot be written ({error.strerror}); give another --output.") from error

    def _write(self) -> None:
        lines: list[dict[str, Any]] = [{"settings": self._settings}, *map(asdict, self.runs)]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        atomic.write_bytes(self.file, gzip.compress(text.encode(), mtime=0))


def read(file: Path) -> tuple[dict[str, Any], list[Run]]:
    """The settings and the runs of a file.

    Raises:
        OSError: there is none.
        ValueError, KeyError, TypeError: it holds something else.
    """
    content = file.read_bytes()
    try:
        head, *lines = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file.name} is damaged: {error}") from error
    settings: dict[str, Any] = head["settings"]
    return settings, [Run.from_json(line) for line in lines]
