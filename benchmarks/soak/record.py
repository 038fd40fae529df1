"""What became of one request; both drivers write it down and the judge reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.mix import Request


@dataclass
class Record:
    """What became of one request."""

    request: Request
    prompt: list[int]
    """All of it, with what it follows."""
    versions: list[int]
    """Of its adapter, in the order in which they were in force while it was in the engine."""
    tokens: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    """For each token of a stream, which of ``versions`` was the last before it was handed out."""
    scores: list[float] | None = None
    cached: int | None = None
    finished: str = ""
    cancelled: bool = False
    late: bool = False
    """Something came after it was cancelled."""

    @property
    def open(self) -> bool:
        """Whether it waits or runs."""
        return not (self.finished or self.cancelled)

    def as_json(self) -> dict[str, Any]:
        """For the judge, which may be another process."""
        return {**vars(self), "request": vars(self.request)}
