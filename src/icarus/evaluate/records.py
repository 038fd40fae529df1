"""Results of an evaluation that is not finished: JSON lines beside the report, so that an interrupted one resumes.

The first line says what the results depend on; those of another evaluation are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icarus import atomic
from icarus.errors import InputError
from icarus.evaluate.run import Outcome


class Records:
    """The results so far, in ``FILE.partial`` for a report ``FILE``; in memory alone without one.

    Raises:
        InputError: the file holds results of another evaluation or something else, or cannot be written.
    """

    def __init__(self, report: Path | None, identity: Mapping[str, Any]) -> None:
        self.outcomes: list[Outcome] = []
        self._file = report.parent / f"{report.name}.partial" if report else None
        head = json.dumps({"evaluation": identity}, sort_keys=True)
        if report is None or self._file is None:
            return
        if report.is_dir():
            raise InputError(f"{report} is a folder; give --json the name of a file.")
        try:
            text = self._file.read_text(encoding="utf-8") if self._file.exists() else ""
            lines, unfinished = text.split("\n")[:-1], text.rpartition("\n")[2]
            ours = lines[0] == head if lines else head.startswith(unfinished)
            if not ours:
                raise InputError(
                    f"{self._file} holds results of an evaluation with another base model, adapter, task, dtype or "
                    "scorers; remove it, or give another --json."
                )
            self._read(lines[1:])
            if not lines or unfinished or len(self.outcomes) < len(lines) - 1:
                kept = [head, *(json.dumps(asdict(outcome)) for outcome in self.outcomes)]
                atomic.write_text(self._file, "".join(f"{line}\n" for line in kept))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Results cannot be kept in {self._file} ({error}); give another --json.") from error

    def _read(self, lines: Sequence[str]) -> None:
        """Those before the line that was being written when it ended."""
        for line in lines:
            try:
                self.outcomes.append(Outcome(**json.loads(line)))
            except (ValueError, TypeError):
                break

    def done(self, task: str) -> list[tuple[str, str]]:
        """(side, item) of a task that are known."""
        return [(outcome.side, outcome.item) for outcome in self.outcomes if outcome.task == task]

    def add(self, outcome: Outcome) -> None:
        """Keep a result."""
        self.outcomes.append(outcome)
        if self._file:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")

    def finish(self) -> None:
        """The report is written, and holds all of them."""
        if self._file:
            self._file.unlink(missing_ok=True)
