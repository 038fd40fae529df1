"""What an adapter folder holds, for whoever is about to serve it: its kind, its rank, or why it cannot be served.

A conventional adapter writes its K/V into the pool that everybody's blocks come from, so it is verified like an ICaRus
adapter. vLLM serves some base models whose files are unreadable here; of those the files do not tell whether such an
adapter fits, and vLLM's own checks have to do.

Nothing here imports vLLM, unless an adapter asks for what only some versions of it can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from icarus import adapter
from icarus.errors import AdapterError, InputError
from icarus.vllm import abilities

BaseFolder = Callable[[], Path | None]
"""Gives the folder of the base model's weights, or None where it is unknown yet.

Raises:
    InputError: the model is missing or cannot be downloaded.
"""


@dataclass(frozen=True)
class Described:
    """A sound adapter folder."""

    rank: int  # the highest of its modules
    base_fingerprint: str  # empty for a conventional adapter

    @property
    def shares(self) -> bool:
        """Whether it is an ICaRus adapter, which shares the base model's cache."""
        return bool(self.base_fingerprint)


def describe(folder: Path, base: BaseFolder, *, heads: bool = False) -> Described:
    """Verify an adapter, against its base model if that is known.

    Args:
        folder: of the adapter.
        base: called at most once.
        heads: whether the server's model is one for classification, whose adapters may have a head.

    Raises:
        AdapterError: it is damaged, of another base model, no adapter, or more than the installed vLLM serves.
        InputError: ``base`` raised it, and the adapter is an ICaRus adapter.
    """
    info: adapter.AdapterInfo | adapter.ConventionalInfo
    if adapter.is_icarus(folder):
        info = adapter.verify(folder, base())
        fingerprint = info.base_fingerprint
    else:
        info, fingerprint = _conventional(folder, base, heads), ""
    if info.patterns and not abilities.reads_patterns():
        raise AdapterError(
            f"{folder} has {' and '.join(info.patterns)}, which this version of vLLM ignores; install vLLM 0.32.0, or "
            "retrain with one rank and one alpha."
        )
    return Described(info.rank, fingerprint)


def _conventional(folder: Path, base: BaseFolder, heads: bool) -> adapter.ConventionalInfo:
    if heads:  # vLLM makes a classifier of any model, and then modules have other names
        return adapter.verify_conventional(folder, heads=True)
    try:
        return adapter.verify_conventional(folder, base())
    except AdapterError:
        raise
    except InputError:  # the base model has no weights that can be read here
        return adapter.verify_conventional(folder)
