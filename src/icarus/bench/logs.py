"""The end of a process's log, for the message that says it failed."""

from __future__ import annotations

from pathlib import Path


def last_lines(log: Path, count: int = 15) -> str:
    """The last lines, as a part of a message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    return "\n  ".join([f"The last lines of {log}:", *lines])
