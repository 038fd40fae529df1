"""Adapter folders as a server sees them: what a folder holds, and which folders a client may name.

Nothing here imports vLLM.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from icarus import adapter
from icarus.errors import AdapterError

ALLOWED_VARIABLE = "ICARUS_ADAPTER_FOLDERS"
"""Environment variable: folders below which clients may load adapters, separated as in ``PATH``. Unset: anywhere."""


@dataclass(frozen=True)
class Described:
    """A sound adapter folder."""

    rank: int
    base_fingerprint: str  # empty for a conventional adapter

    @property
    def shares(self) -> bool:
        """Whether it is an ICaRus adapter, which shares the base model's cache."""
        return bool(self.base_fingerprint)


def describe(folder: Path, base: Path | None) -> Described:
    """What an adapter folder holds. An ICaRus adapter is verified, against ``base`` if that is given.

    Raises:
        AdapterError: the adapter is damaged or of another base model, or the folder holds none.
    """
    if adapter.is_icarus(folder):
        info = adapter.verify(folder, base)
        return Described(info.rank, info.base_fingerprint)
    return Described(_conventional_rank(folder), "")


def _conventional_rank(folder: Path) -> int:
    """The rank of an adapter that vLLM can read; vLLM itself would report damage only while it serves others.

    Raises:
        AdapterError: the adapter cannot be read.
    """
    try:
        config = json.loads((folder / adapter.CONFIG_NAME).read_text(encoding="utf-8"))
        rank = config["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} is not an adapter: its {adapter.CONFIG_NAME} is unreadable or has no rank r ({error}); "
            "copy or save it again."
        ) from error
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{folder}: r is {rank!r} and must be a positive integer; save the adapter again.")
    try:
        adapter.read_tensors(folder)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}.") from error
    return rank


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
