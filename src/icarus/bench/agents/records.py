"""Raw results in a file of JSON lines: the settings first, then one line for each finished run, appended at once.

An interrupted command resumes. Settings that give a finished run another meaning are refused. A file that has been
compressed (``runs.jsonl.gz``) is read as well.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from icarus.bench.agents.load import CallRecord
from icarus.bench.agents.plan import Unit
from icarus.errors import InputError

GRID = {"systems", "models", "workloads", "rates", "repeats", "start_seconds"}
"""Settings that only say how many runs there are; they may change between commands that write into one file."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run. Times in seconds since its start, latencies of workflows since their arrival."""

    unit: Unit
    kv_tokens: int
    commit: str | None
    duration: float
    arrivals: Sequence[float]
    workflows: Sequence[float]
    prompt_tokens_prefilled: int
    cached_tokens: int
    preemptions: int
    kv_usage: Sequence[tuple[float, float]]  # (seconds, share of blocks in use)
    peak_memory_mb: int | None  # None where there is no /proc
    calls: Sequence[CallRecord]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """From a line of the file. Raises TypeError and KeyError for one of another shape."""
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
        meaning: dict[str, Any] = json.loads(json.dumps({k: v for k, v in settings.items() if k not in GRID}))
        _unpack(file)
        if file.exists() and file.stat().st_size:
            self._resume(meaning)
        else:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._append({"settings": meaning})
            except OSError as error:
                raise InputError(f"{file} cannot be written ({error.strerror}); give another --output.") from error

    def done(self, unit: Unit) -> bool:
        """Whether a run is finished."""
        return any(run.unit == unit for run in self.runs)

    def add(self, run: Run) -> None:
        """Write a finished run."""
        self.runs.append(run)  # first, so that an interrupt cannot leave it out of the report
        self._append(asdict(run))

    def _resume(self, meaning: Mapping[str, Any]) -> None:
        text = self.file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line without its end was not finished
        try:
            before, self.runs = _parsed(whole)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.file} holds no runs of this command; give another --output.") from error
        if odd := sorted(key for key in before.keys() | meaning.keys() if before.get(key) != meaning.get(key)):
            raise InputError(
                f"{self.file} holds runs with another {', '.join(odd)}: give another --output, or remove that folder."
            )
        if whole != text:
            os.truncate(self.file, len(whole.encode()))

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())


def read(file: Path) -> list[Run]:
    """The runs of a file, or of ``FILE.gz`` in its place.

    Raises:
        OSError: there is neither.
        ValueError, KeyError, TypeError: it holds something else.
    """
    return _parsed(_text(file))[1]


def _parsed(text: str) -> tuple[dict[str, Any], list[Run]]:
    head, *lines = [json.loads(line) for line in text.splitlines()]
    settings: dict[str, Any] = head["settings"]
    return settings, [Run.from_json(line) for line in lines]


def _packed(file: Path) -> Path:
    return file.with_name(file.name + ".gz")


def _text(file: Path) -> str:
    if _packed(file).exists() and not file.exists():
        return gzip.decompress(_packed(file).read_bytes()).decode()
    return file.read_text(encoding="utf-8")


def _unpack(file: Path) -> None:
    """Lines can be appended to a plain file only."""
    if _packed(file).exists() and not file.exists():
        scratch = file.with_name(file.name + ".tmp")
        scratch.write_text(_text(file), encoding="utf-8")
        scratch.replace(file)
        _packed(file).unlink()
