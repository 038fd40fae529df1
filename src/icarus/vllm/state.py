"""What the plugin remembers about an object of vLLM, for as long as that object lives.

A value is an attribute of its owner, so that it costs one look-up in every step, and goes where a copy or a pickle of
the owner goes. Weak references are no alternative: some owners, attention metadata among them, are not hashable.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_MISSING = object()


class Attached(Generic[T]):
    """One kind of value that the plugin attaches to objects of vLLM."""

    def __init__(self, name: str) -> None:
        """``name`` tells the values on one owner apart."""
        self._attribute = f"_icarus_{name}"
        self._making = RLock()

    def get(self, owner: Any) -> T | None:
        """The value on an owner, or None if it has none."""
        value: T | None = getattr(owner, self._attribute, None)
        return value

    def set(self, owner: Any, value: T | None) -> None:
        """Put a value on an owner, in the place of the last one."""
        setattr(owner, self._attribute, value)

    def get_or_make(self, owner: Any, make: Callable[[], T]) -> T:
        """The value on an owner; the first call makes it, once, whichever thread comes first."""
        value: Any = getattr(owner, self._attribute, _MISSING)
        if value is _MISSING:
            with self._making:
                value = getattr(owner, self._attribute, _MISSING)
                if value is _MISSING:
                    value = make()
                    self.set(owner, value)
        made: T = value
        return made
