"""Files that are missing, cut, or no files."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.soak.malformed.case import CONFIG, WEIGHTS, Case, Damage, on, refused, served

SPARSE = 3 << 30
"""Bytes of a file that says so and holds nothing: whoever reads it to its end shows."""

_ABSENT = "missing|No such file"


def cases() -> Iterator[Case]:
    """Of both files, and of what may lie beside them."""
    for file in (CONFIG, WEIGHTS):
        yield from _of(file)
    for what, size in (("7 bytes", 7), ("8 bytes", 8), ("9 bytes", 9), ("100 bytes", 100)):
        yield refused(f"first {what} of the weights", on(WEIGHTS, _resized(_to(size))), WEIGHTS)
    yield refused("last byte cut", on(WEIGHTS, _resized(lambda size: size - 1)), WEIGHTS)
    yield refused("one byte more", on(WEIGHTS, _resized(lambda size: size + 1)), WEIGHTS)
    yield refused("a hole behind the tensors", on(WEIGHTS, _resized(_to(SPARSE))), WEIGHTS)
    pickled = refused("a pickle instead", on(WEIGHTS, lambda path: path.rename(path.with_name("adapter_model.bin"))))
    yield replace(pickled, whole=False)
    yield served("a pickle besides", lambda folder: (folder / "adapter_model.bin").write_bytes(b"junk"))
    yield served("no README.md", lambda folder: (folder / "README.md").unlink(missing_ok=True))
    yield served("other files and folders", _clutter)


def _of(file: str) -> Iterator[Case]:
    yield replace(refused(f"no {file}", on(file, Path.unlink), _ABSENT), whole=False)
    yield replace(refused(f"dangling link for {file}", on(file, _link("/nowhere")), _ABSENT), whole=False)
    yield replace(refused(f"link to itself for {file}", on(file, _link(file))), whole=False)
    yield refused(f"empty {file}", on(file, _resized(_to(0))), file)
    yield refused(f"zeros for {file}", on(file, lambda path: path.write_bytes(bytes(4096))), file)
    yield refused(f"half of {file}", on(file, _resized(lambda size: size // 2)), file)
    yield served(f"link to another {file}", on(file, _moved))
    yield refused(f"folder for {file}", on(file, _instead(Path.mkdir)))
    yield refused(f"pipe for {file}", on(file, _instead(os.mkfifo)))
    yield refused(f"socket for {file}", on(file, _instead(_socket)))
    yield refused(f"/dev/zero for {file}", on(file, _link("/dev/zero")))
    yield refused(f"/dev/null for {file}", on(file, _link("/dev/null")))
    yield refused(f"what gives an input error for {file}", on(file, _link("/proc/self/mem")))
    if os.geteuid():  # who may read everything reads this, too
        yield refused(f"unreadable {file}", on(file, lambda path: path.chmod(0)))


def _to(size: int) -> Callable[[int], int]:
    return lambda _: size


def _resized(change: Callable[[int], int]) -> Damage:
    """Cut, or longer by a hole."""
    return lambda path: os.truncate(path, change(path.stat().st_size))


def _instead(make: Damage) -> Damage:
    """Something else under the name of a file."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _link(target: str) -> Damage:
    return _instead(lambda path: path.symlink_to(target))


def _moved(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    elsewhere.mkdir()
    path.rename(elsewhere / path.name)
    path.symlink_to(f"elsewhere/{path.name}")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def _clutter(folder: Path) -> None:
    for name in ("tokenizer.json", "new_embeddings.safetensors", "added_tokens.json", "chat_template.jinja"):
        (folder / name).write_text("{")
    (folder / "checkpoint-1").mkdir()
