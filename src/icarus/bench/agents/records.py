"""Raw results in a file of JSON lines: the settings first, then one line for each finished run.

An interrupted command resumes. Settings that give a finished run another meaning are refused. A file that has been
compressed (``runs.jsonl.gz``) is read as well, and unpacked with the next run.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from icarus import atomic
from icarus.bench.agents.load import CallRecord, Traffic
from icarus.bench.agents.plan import Unit
from icarus.errors import InputError

GRID = {"systems", "models", "workloads", "rates", "repeats", "start_seconds"}
"""Settings that only say how many runs there are; they may change between commands that write into one file."""


@dataclass(frozen=True, kw_only=True)
class Run(Traffic):
    """One finished run."""

    unit: Unit
    kv_tokens: int
    commit: str | None
    peak_memory_mb: int | None  # None where there is no /proc

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
        self._settings = {key: value for key, value in settings.items() if key not in GRID}
        try:
            before, self.runs = _parsed(file)
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
        atomic.write_text(self.file, "".join(f"{json.dumps(line)}\n" for line in lines))
        _packed(self.file).unlink(missing_ok=True)


def read(file: Path) -> list[Run]:
    """The runs of a file, or of ``FILE.gz`` in its place.

    Raises:
        OSError: there is neither.
        ValueError, KeyError, TypeError: it holds something else.
    """
    return _parsed(file)[1]


def _parsed(file: Path) -> tuple[dict[str, Any], list[Run]]:
    if _packed(file).exists() and not file.exists():
        text = gzip.decompress(_packed(file).read_bytes()).decode()
    else:
        text = file.read_text(encoding="utf-8")
    head, *lines = [json.loads(line) for line in text.splitlines()]
    settings: dict[str, Any] = head["settings"]
    return settings, [Run.from_json(line) for line in lines]


def _packed(file: Path) -> Path:
    return file.with_name(file.name + ".gz")
