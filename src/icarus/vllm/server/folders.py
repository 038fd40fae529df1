"""Adapter folders as a server sees them: what one holds, and which ones a client may name.

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
"""Environment variable: folders, parted as in ``PATH``, below which clients may load adapters. Unset: anywhere."""


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
    """What an adapter folder holds; one with the ICaRus marker is verified, against ``base`` if that is given.

    Raises AdapterError for one that is damaged, of another base model, or no adapter.
    """
    if adapter.is_icarus(folder):
        info = adapter.verify(folder, base)
        return Described(info.rank, info.base_fingerprint)
    return Described(_conventional_rank(folder), "")


def _conventional_rank(folder: Path) -> int:
    """Raises AdapterError where vLLM could not read it, or would only say so while it serves others."""
    try:
        config = json.loads((folder / adapter.CONFIG_NAME).read_text(encoding="utf-8"))
        rank = config["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} is no adapter: its {adapter.CONFIG_NAME} cannot be read or has no rank r ({error}); "
            "copy or save it again."
        ) from error
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{folder}: r is {rank!r} and not a positive whole number; save the adapter again.")
    try:
        adapter.read_tensors(folder)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}.") from error
    return rank


def allowed() -> list[Path] | None:
    """The folders of ``ALLOWED_VARIABLE`` with their symbolic links resolved; None where any folder is allowed."""
    listed = os.environ.get(ALLOWED_VARIABLE)
    if listed is None:
        return None
    return [Path(item).resolve() for item in listed.split(os.pathsep) if item]


def permitted(path: str, folders: Iterable[Path]) -> Path | None:
    """The absolute path that a client means, symbolic links resolved; None outside of ``folders``.

    It need not exist. Since it is absolute it is never taken for a hub id, which vLLM would download.
    """
    try:
        target = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, no such user, a null character
        return None
    return target if any(target.is_relative_to(folder) for folder in folders) else None
