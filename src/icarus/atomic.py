"""Directories and files are replaced as a whole: whatever happens, they hold what they held, or all of what is new."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from icarus.errors import AdapterError


@contextmanager
def replacing(directory: Path, *, key: str, obsolete: Iterable[str] = ()) -> Iterator[Path]:
    """Gives an empty folder to fill with files, which takes the directory's place when the block ends without an error.

    What else the directory holds is kept, except the files in ``obsolete``. File ``key`` is what makes the directory
    count: one without it is just the user's folder, and gets the new files one by one, ``key`` last.
    """
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory} is a file and an adapter is a directory; choose another path.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = directory.parent / f".{directory.name}.{uuid4().hex[:8]}.tmp"
    work.mkdir()  # not mkdtemp, whose folders only their owner can read
    try:
        yield work
        for path in (*work.iterdir(), work):
            _sync(path)
        if (directory / key).exists():
            _keep_others(directory, work, {*obsolete, *os.listdir(work)})
            _swap(work, directory)
        elif directory.exists() and any(directory.iterdir()):
            for file in sorted(os.listdir(work), key=key.__eq__):
                os.replace(work / file, directory / file)
            _sync(directory)
        else:
            os.replace(work, directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _keep_others(directory: Path, work: Path, replaced: set[str]) -> None:
    """Links (or copies) into ``work`` what the directory holds besides."""

    def link(source: str, copied: str) -> None:
        try:
            os.link(source, copied)
        except OSError:  # a file system without hard links
            shutil.copy2(source, copied)

    def ignore(folder: str, files: list[str]) -> set[str]:
        return replaced & set(files) if Path(folder) == directory else set()

    shutil.copytree(directory, work, ignore=ignore, copy_function=link, symlinks=True, dirs_exist_ok=True)


def _swap(work: Path, directory: Path) -> None:
    """In one step where the system can, else in two with a way back."""
    if _exchange(work, directory):
        return
    old = work.with_suffix(".old")
    os.replace(directory, old)
    try:
        os.replace(work, directory)
    except BaseException:
        os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where system or file system lacks it (nothing is changed then)."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def write_text(file: Path, text: str) -> None:
    """Write a file in UTF-8, as ``write_bytes`` does."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file; another process sees it as it was, or with all of ``content``. A device or a pipe is written to.

    Raises:
        OSError: the file cannot be written.
    """
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    work = file.with_name(f".{file.name}.{uuid4().hex[:8]}.tmp")
    try:
        work.write_bytes(content)
        _sync(work)
        os.replace(work, file)
    finally:
        work.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
