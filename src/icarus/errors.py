"""One tree of errors; every message names the input and says what to do.

IcarusError
├── InputError                 what the user gave cannot be used        exit status 2
│   ├── AdapterError           an adapter directory that must not share a cache
│   ├── DataError              a training file: names file, line and field
│   └── UnsupportedModelError  a model or setting that the method does not support
└── CheckFailed                a check ran, and the answer is no        exit status 1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class IcarusError(Exception):
    """Root of all errors that this project raises on purpose."""

    exit_status = 1


class InputError(IcarusError):
    """The input cannot be used; the message names it and the remedy."""

    exit_status = 2


class AdapterError(InputError):
    """An adapter directory is damaged, foreign, or unsafe to share a KV cache with."""


class DataError(InputError):
    """Training data that cannot be used; the message names file, line and field."""


class UnsupportedModelError(InputError):
    """The method does not support this model or setting; the message says why."""


class CheckFailed(IcarusError):
    """A requested check ran to its end and failed; ``report`` is what ``--json`` writes of it."""

    def __init__(self, message: str, report: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


def first_line(error: BaseException) -> str:
    """What another library's exception says, as part of a sentence: its first line, without the full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".")
