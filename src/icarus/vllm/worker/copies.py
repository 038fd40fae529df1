"""Copies of adapters, which a worker reads in place of their folders.

vLLM keeps ``--max-cpu-loras`` adapters in memory, and reads one that it has evicted from its folder again: in the
middle of a step, where an error ends the engine, and by the path that some request happens to name. By then the folder
may be gone, half-written, or hold the next version. So a worker copies what was verified when it first reads it, and
reads nothing else until the adapter is replaced.

Nothing here imports vLLM.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from icarus.adapter import CONFIG_NAME, WEIGHTS_NAME
from icarus.errors import AdapterError

_ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME)


def digest(folder: Path) -> str:
    """SHA-256 of the files of an adapter. Raises AdapterError where one cannot be read."""
    with ExitStack() as opened:
        try:
            return _digest([opened.enter_context((folder / name).open("rb")) for name in _ADAPTER_FILES])
        except OSError as error:
            raise AdapterError(
                f"{error.filename} cannot be read ({error.strerror}); save the adapter again."
            ) from error


def _digest(files: Iterable[BinaryIO]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]  # typeshed wants less
    return found.hexdigest()


@dataclass(frozen=True)
class _Copy:
    """Files without a name, which the system removes when they are closed or the process ends, however it ends."""

    generation: int
    files: tuple[BinaryIO, ...]

    def close(self) -> None:
        for file in self.files:
            file.close()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder that shows them under their names, for this process and for a while."""
        with tempfile.TemporaryDirectory(prefix="icarus-adapter-") as made:
            for name, file in zip(_ADAPTER_FILES, self.files, strict=True):
                file.seek(0)
                (Path(made) / name).symlink_to(f"/dev/fd/{file.fileno()}")
            yield Path(made)


class Copies:
    """What one worker keeps of the adapters that it serves."""

    def __init__(self) -> None:
        self._kept: dict[int, _Copy] = {}
        self._staged: dict[int, _Copy] = {}

    def stage(self, adapter_id: int, generation: int, sha256: str, locate: Callable[[], Path]) -> None:
        """Copy what ``reading`` will read with the same arguments; until then the last generation is served.

        All workers do this before the first of them replaces an adapter, since copying is what one is likely to fail
        at alone: then none replaces it. Raises AdapterError as ``reading`` does.
        """
        if (kept := self._kept.get(adapter_id)) and generation <= kept.generation:
            return
        fresh = _copy(locate(), generation, sha256)
        self.discard(adapter_id)
        self._staged[adapter_id] = fresh

    @contextmanager
    def reading(self, adapter_id: int, generation: int, sha256: str, locate: Callable[[], Path]) -> Iterator[Path]:
        """The folder to read an adapter from.

        Args:
            generation: grows whenever an adapter is loaded or replaced. A request that waited while its adapter was
                replaced still has the old one, and reads what is served now.
            sha256: ``digest`` of what was verified.
            locate: gives the folder that the request names; called for a new generation only. That is copied, and kept
                in the place of the last one if the block ends without an exception.

        Raises AdapterError where the folder has changed since it was verified.
        """
        kept = self._kept.get(adapter_id)
        if kept and generation <= kept.generation:
            with kept.folder() as folder:
                yield folder
            return
        staged = self._staged.get(adapter_id)
        if staged and staged.generation == generation:
            fresh = self._staged.pop(adapter_id)
        else:
            fresh = _copy(locate(), generation, sha256)
        try:
            with fresh.folder() as folder:
                yield folder
        except BaseException:
            fresh.close()
            raise
        self.drop(adapter_id)
        self._kept[adapter_id] = fresh

    def drop(self, adapter_id: int) -> None:
        """Forget an adapter that is not served any more."""
        self.discard(adapter_id)
        if kept := self._kept.pop(adapter_id, None):
            kept.close()

    def discard(self, adapter_id: int) -> None:
        """Forget a copy that was staged and not read."""
        if staged := self._staged.pop(adapter_id, None):
            staged.close()


def _copy(folder: Path, generation: int, sha256: str) -> _Copy:
    with ExitStack() as made:
        try:
            files = tuple(made.enter_context(_unnamed(folder / name)) for name in _ADAPTER_FILES)
        except OSError as error:
            raise AdapterError(f"{folder} cannot be copied ({error}); load the adapter again.") from error
        if _digest(files) != sha256:
            raise AdapterError(f"{folder} has changed since it was verified; load the adapter again.")
        made.pop_all()  # they stay open
    return _Copy(generation, files)


def _unnamed(original: Path) -> BinaryIO:
    """A copy of a file, at its beginning."""
    copy: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  # its owner closes it
    try:
        with original.open("rb") as source:
            shutil.copyfileobj(source, copy)
    except BaseException:
        copy.close()
        raise
    copy.flush()  # it is read through other descriptors, too
    copy.seek(0)
    return copy
