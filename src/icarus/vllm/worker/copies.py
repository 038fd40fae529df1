"""Copies of adapters, which a worker reads instead of their folders.

vLLM keeps ``--max-cpu-loras`` adapters in memory. It reads an evicted one again from its folder: in the middle of a
step, where an error ends the engine, and by the path that some request happens to name. By then the folder may be gone,
half-written, or hold the next version. So a worker copies the verified files when it first reads them, and reads
nothing else until the adapter is replaced.

Nothing here imports vLLM.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from icarus.adapter import CONFIG_NAME, weights_name
from icarus.errors import AdapterError


def digest(folder: Path) -> str:
    """SHA-256 of an adapter's files.

    Raises:
        AdapterError: one of them cannot be read.
    """
    with ExitStack() as opened:
        try:
            return _digest(
                [opened.enter_context(_opened(folder / name)) for name in (CONFIG_NAME, weights_name(folder))]
            )
        except OSError as error:
            raise AdapterError(
                f"{error.filename} cannot be read ({error.strerror}); save the adapter again."
            ) from error


def _opened(file: Path) -> BinaryIO:
    """A regular file: to open a pipe is to wait for whoever writes to it.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    handle = open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(file))
    return handle


def _digest(files: Iterable[BinaryIO]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]  # typeshed wants less
    return total.hexdigest()


@dataclass(frozen=True)
class _Copy:
    """Files without a name: the system removes them when they are closed or the process ends, however it ends."""

    generation: int
    names: tuple[str, ...]
    files: tuple[BinaryIO, ...]

    def close(self) -> None:
        for file in self.files:
            file.close()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A temporary folder in which this process sees them under their names."""
        with tempfile.TemporaryDirectory(prefix="icarus-adapter-") as folder:
            for name, file in zip(self.names, self.files, strict=True):
                file.seek(0)
                (Path(folder) / name).symlink_to(f"/dev/fd/{file.fileno()}")
            yield Path(folder)


class Copies:
    """The copies of one worker."""

    def __init__(self) -> None:
        self._kept: dict[int, _Copy] = {}
        self._staged: dict[int, _Copy] = {}

    def stage(self, adapter_id: int, generation: int, sha256: str, locate: Callable[[], Path]) -> bool:
        """Copy what ``reading`` will read with the same arguments; until then the last generation is served.

        All workers do this before the first of them replaces an adapter. Copying is where one is most likely to fail
        alone, and then none of them replaces it.

        Returns:
            Whether there is something new to read.

        Raises:
            AdapterError: the folder cannot be copied, or has changed since it was verified.
        """
        if (kept := self._kept.get(adapter_id)) and generation <= kept.generation:
            return False
        fresh = _copy(locate(), generation, sha256)
        self.discard(adapter_id)
        self._staged[adapter_id] = fresh
        return True

    def staged(self, adapter_id: int) -> AbstractContextManager[Path]:
        """The folder that ``reading`` will give."""
        return self._staged[adapter_id].folder()

    @contextmanager
    def reading(self, adapter_id: int, generation: int, sha256: str, locate: Callable[[], Path]) -> Iterator[Path]:
        """The folder to read an adapter from.

        Args:
            adapter_id: the engine's id of the adapter.
            generation: grows whenever an adapter is loaded or replaced. A request that waited while its adapter was
                replaced has an older one, and reads what is served now.
            sha256: ``digest`` of the files that were verified.
            locate: returns the folder that the request names; called for a new generation only. That folder is copied,
                and the copy replaces the last one if the block ends without an exception.

        Raises:
            AdapterError: the folder cannot be copied, or has changed since it was verified.
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
        """Delete the copies of an adapter that is no longer served."""
        self.discard(adapter_id)
        if kept := self._kept.pop(adapter_id, None):
            kept.close()

    def discard(self, adapter_id: int) -> None:
        """Delete a copy that was staged and not read."""
        if staged := self._staged.pop(adapter_id, None):
            staged.close()


def _copy(folder: Path, generation: int, sha256: str) -> _Copy:
    with ExitStack() as opened:
        try:
            names = CONFIG_NAME, weights_name(folder)
            files = tuple(opened.enter_context(_unnamed(folder / name)) for name in names)
        except OSError as error:
            raise AdapterError(f"{folder} cannot be copied ({error}); load the adapter again.") from error
        if _digest(files) != sha256:
            raise AdapterError(f"{folder} has changed since it was verified; load the adapter again.")
        opened.pop_all()  # they stay open
    return _Copy(generation, names, files)


def _unnamed(original: Path) -> BinaryIO:
    """A copy of a file that has no name, at its beginning."""
    copy: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  # its owner closes it
    try:
        with _opened(original) as source:
            shutil.copyfileobj(source, copy)
    except BaseException:
        copy.close()
        raise
    copy.flush()  # other descriptors read it, too
    copy.seek(0)
    return copy
