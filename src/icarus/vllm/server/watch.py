"""A watched folder of adapters: names appear and disappear with its subfolders.

Copying an adapter takes time, and whoever copies it need not know that a server is watching. So a subfolder counts when
it has both files of an adapter and two looks in a row see it in the same state. A name is gone when two looks in a row
miss it. A subfolder that was refused is tried again when it has changed.

Nothing here imports vLLM, or knows how an adapter is loaded.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from icarus.adapter import CONFIG_NAME, WEIGHTS_NAME

WATCHED_VARIABLE = "ICARUS_ADAPTER_DIR"
"""Environment variable: the folder whose subfolders a server serves under their names. Empty or unset: none."""

State = tuple[tuple[int, int, int], ...]  # for each file: inode, size in bytes, time of change in ns

Load = Callable[[str, Path, bool], Awaitable[str]]  # name, folder, whether it replaces; returns a refusal, or ""
Unload = Callable[[str], Awaitable[None]]
Report = Callable[[str], None]


def scan(root: Path) -> dict[str, State]:
    """Name and state of each subfolder with both files of an adapter. Hidden ones are work in progress.

    Raises:
        OSError: ``root`` cannot be read.
    """
    states = {}
    for entry in os.scandir(root):
        if entry.name.startswith("."):
            continue
        try:
            files = [(Path(entry.path) / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
        except OSError:  # not a folder, not complete yet, or just renamed
            continue
        states[entry.name] = tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)
    return states


class Watcher:
    """Keeps what is served in step with one folder."""

    def __init__(self, root: Path, load: Load, unload: Unload, report: Report) -> None:
        """
        Args:
            root: the folder whose subfolders are adapters, each under its own name.
            load: loads or replaces an adapter, and returns why it did not.
            unload: unloads an adapter.
            report: is told of each refusal, once for each state of a subfolder.
        """
        self._root, self._load, self._unload, self._report = root, load, unload, report
        self._before: dict[str, State] = {}  # what the last look saw
        self._tried: dict[str, State] = {}  # the state that was last loaded or refused
        self._served: set[str] = set()
        self._failed: dict[str, str] = {}  # the last report on a subfolder that is tried again
        self._unreadable = False  # whether the folder itself cannot be read

    async def run(self, seconds: float) -> None:
        """Look again and again, forever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.look()
            except Exception as error:  # of the engine; the watcher lives as long as the server
                self._report(f"{self._root} could not be followed ({type(error).__name__}: {error}).")

    async def look(self, *, first: bool = False) -> None:
        """Look once. The ``first`` look takes subfolders as they are, because nobody waits for a second one."""
        try:
            states = await asyncio.to_thread(scan, self._root)
        except OSError as error:
            if not self._unreadable:
                self._report(f"{self._root} cannot be read ({error.strerror}); what was loaded from it stays.")
            self._unreadable = True
            return
        self._unreadable = False
        for name, state in sorted(states.items()):
            if self._tried.get(name) != state and (first or self._before.get(name) == state):
                await self._take(name, state)
        for name in sorted(self._tried.keys() - states.keys() - self._before.keys()):
            await self._drop(name)
        self._failed = {name: report for name, report in self._failed.items() if name in states}
        self._before = states

    async def _take(self, name: str, state: State) -> None:
        still = "; what was loaded before stays" if name in self._served else ""
        try:
            refusal = await self._load(name, self._root / name, name in self._served)
        except Exception as error:  # says nothing about the adapter: the next look tries again, and reports only news
            report = f"{type(error).__name__}: {error}"
            if self._failed.get(name) != report:
                self._report(f"Not loaded yet from {self._root / name}: {report}{still}")
            self._failed[name] = report
            return
        self._failed.pop(name, None)
        self._tried[name] = state
        if refusal:
            self._report(f"Not loaded from {self._root / name}: {refusal}{still}")
        else:
            self._served.add(name)

    async def _drop(self, name: str) -> None:
        del self._tried[name]
        if name in self._served:
            self._served.discard(name)
            await self._unload(name)
