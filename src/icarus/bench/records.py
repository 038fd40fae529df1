"""Raw results in a file of JSON lines: the settings first, then one line for each finished unit, appended at once.

An interrupted run resumes. Settings that give a finished unit another meaning are refused. A file that has been
compressed (``runs.jsonl.gz``) is read as well.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icarus.errors import InputError

GRID = {"systems", "models", "workloads", "rates", "repeats", "start_seconds"}
"""Settings that only say how many units there are; they may change between runs into one file."""


class Records:
    """The finished units of one file."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Opens the file, or starts it. Raises InputError for a file of other settings or of no such run."""
        self.file = file
        _unpack(file)
        self.units: list[dict[str, Any]] = []
        meaning = _plain({key: value for key, value in settings.items() if key not in GRID})
        if file.exists() and file.stat().st_size:
            self._read(meaning)
        else:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._append({"settings": meaning})
            except OSError as error:
                raise InputError(f"{file} cannot be written ({error.strerror}); give another --output.") from error

    def done(self, unit: Mapping[str, Any]) -> bool:
        """Whether a unit is finished."""
        return any(found["unit"] == unit for found in self.units)

    def add(self, unit: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Write a finished unit."""
        record = _plain({"unit": unit, **measured})
        self.units.append(record)  # first, so that an interrupt cannot leave it out of the report
        self._append(record)

    def _read(self, meaning: dict[str, Any]) -> None:
        text = self.file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a line without its end was broken off
        try:
            head, *self.units = [json.loads(line) for line in whole.splitlines()]
            found = head["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.file} holds no runs of this command; give another --output.") from error
        if odd := sorted(key for key in found.keys() | meaning.keys() if found.get(key) != meaning.get(key)):
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


def read(file: Path) -> str:
    """The text of a file of runs, or of ``FILE.gz`` in its place."""
    packed = _packed(file)
    if packed.exists() and not file.exists():
        return gzip.decompress(packed.read_bytes()).decode()
    return file.read_text(encoding="utf-8")


def _packed(file: Path) -> Path:
    return file.with_name(file.name + ".gz")


def _unpack(file: Path) -> None:
    """Lines can be appended to a plain file only."""
    if _packed(file).exists() and not file.exists():
        scratch = file.with_name(file.name + ".tmp")
        scratch.write_text(read(file), encoding="utf-8")
        scratch.replace(file)
        _packed(file).unlink()


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
