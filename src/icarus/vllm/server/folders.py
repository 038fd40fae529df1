"""Which adapter folders a client may name.

Nothing here imports vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

ALLOWED_VARIABLE = "ICARUS_ADAPTER_FOLDERS"
"""Environment variable: folders below which clients may load adapters, separated as in ``PATH``. Unset: anywhere."""


def allowed() -> list[Path] | None:
    """The folders of ``ALLOWED_VARIABLE``, symbolic links resolved; None if adapters may be loaded from anywhere."""
    value = os.environ.get(ALLOWED_VARIABLE)
    if value is None:
        return None
    return [Path(folder).resolve() for folder in value.split(os.pathsep) if folder]


def permitted(path: str, folders: Iterable[Path]) -> Path | None:
    """The absolute path that a client means, symbolic links resolved; None if it is outside of ``folders``.

    It need not exist. Because it is absolute, vLLM does not take it for a hub id, which it would download.
    """
    try:
        target = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown user, a null character
        return None
    return target if any(target.is_relative_to(folder) for folder in folders) else None
