"""The decoder rows of the step whose attention metadata is being built.

The model runners know them. Builders of metadata, which find pairs of rows, are told of the batch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from icarus.vllm.step_layout import DecoderRows

_rows: ContextVar[DecoderRows | None] = ContextVar("icarus_attended_step", default=None)


@contextmanager
def step(rows: DecoderRows | None) -> Iterator[None]:
    """Attention metadata that is built in this context belongs to a step with these decoder rows."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def begin(rows: DecoderRows | None) -> None:
    """The same until the next call, where building metadata is not in one block."""
    _rows.set(rows)


def decoder_rows() -> DecoderRows | None:
    """Those of the step; None if it has none, and in warm-up and idle steps."""
    return _rows.get()
