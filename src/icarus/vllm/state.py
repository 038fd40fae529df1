"""Values that the plugin attaches to vLLM's objects, for as long as these live.

A value is an attribute of its owner. So it costs one look-up in a step, and copies and pickles of the owner carry it. A
``WeakKeyDictionary`` does neither, and refuses owners that are not hashable, such as attention metadata.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

_MISSING = object()


class Attached(Generic[T]):
    """One kind of value that the plugin attaches to objects of vLLM."""

    def __init__(self, name: str) -> None:
        """``name`` distinguishes the values on one owner."""
        self._attribute = f"_icarus_{name}"
        self._making = RLock()

    def get(self, owner: Any) -> T | None:
        """The value on an owner, or None if it has none."""
        value: T | None = getattr(owner, self._attribute, None)
        return value

    def get_own(self, owner: type) -> T | None:
        """The value on a class, without those of its parents, or None if it has none."""
        value: T | None = vars(owner).get(self._attribute)
        return value

    def set(self, owner: Any, value: T | None) -> None:
        """Attach a value to an owner, replacing the last one."""
        setattr(owner, self._attribute, value)

    def get_or_make(self, owner: Any, make: Callable[[], T]) -> T:
        """The value on an owner. The first call makes it; of several threads, one does."""
        value: T | object = getattr(owner, self._attribute, _MISSING)
        if value is _MISSING:
            with self._making:
                value = getattr(owner, self._attribute, _MISSING)
                if value is _MISSING:
                    value = make()
                    setattr(owner, self._attribute, value)
        return cast("T", value)
