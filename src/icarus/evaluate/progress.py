"""How far an evaluation is: a bar on a terminal; elsewhere a plain line now and then, for whoever wants them."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

_LINE_EVERY_S = 30.0


class Progress:
    """Of one task; ``total`` is its items times the sides that answer them."""

    def __init__(self, task: str, total: int, *, lines: bool) -> None:
        self._task, self._side = task, ""
        terminal = sys.stderr.isatty()
        self._lines = lines and not terminal
        self._bar: tqdm[Any] = tqdm(total=total, desc=task, unit="item", disable=not terminal)
        self._done, self._total, self._said = 0, total, time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def start(self, side: str) -> None:
        """Whose answers come next."""
        self._side = side
        self._bar.set_postfix(side=side)

    def update(self, items: int) -> None:
        """So many more are done."""
        self._done += items
        self._bar.update(items)
        now = time.monotonic()
        if self._lines and items and (self._done == self._total or now - self._said >= _LINE_EVERY_S):
            self._said = now
            print(f"{self._task}: {self._done} of {self._total} items, side {self._side}", file=sys.stderr, flush=True)
