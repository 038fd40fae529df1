"""A folder of adapters that is watched: names appear and vanish with its folders.

Whoever copies an adapter takes time to do so, and need not know that a server looks on. So a folder counts when it has
both files of an adapter and two looks in a row found them alike; and a name is gone when two looks in a row miss it. A
folder that is refused is tried again when it has changed.

Nothing here imports vLLM, or knows how an adapter is loaded.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from icarus.adapter import CONFIG_NAME, WEIGHTS_NAME

WATCHED_VARIABLE = "ICARUS_ADAPTER_DIR"
"""Environment variable: the folder whose subfolders a server serves under their names; empty or unset for none."""

State = tuple[tuple[int, int, int], ...]  # of each file: inode, size in bytes, time of change in ns

Load = Callable[[str, Path, bool], Awaitable[str]]  # name, folder, whether it replaces; gives a refusal, or ""
Unload = Callable[[str], Awaitable[None]]
Report = Callable[[str], None]


def scan(root: Path) -> dict[str, State]:
    """Name and state of each folder with both files of an adapter; hidden ones are work in progress.

    Raises OSError where ``root`` cannot be read.
    """
    found = {}
    for entry in os.scandir(root):
        if entry.name.startswith("."):
            continue
        try:
            files = [(Path(entry.path) / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
        except OSError:  # no folder, not complete yet, or just renamed
            continue
        found[entry.name] = tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)
    return found


class Watcher:
    """Keeps what is served in step with one folder."""

    def __init__(self, root: Path, load: Load, unload: Unload, report: Report) -> None:
        """
        Args:
            root: the folder whose subfolders are adapters, each under its own name.
            load: loads or replaces one; says why not.
            unload: takes one away.
            report: is told of each refusal, once for each state of a folder.
        """
        self._root, self._load, self._unload, self._report = root, load, unload, report
        self._before: dict[str, State] = {}  # what the last look found
        self._tried: dict[str, State] = {}  # what was last loaded or refused
        self._served: set[str] = set()
        self._failed: dict[str, str] = {}  # what was last said of one that will be tried again
        self._lost = False  # whether the folder itself cannot be read

    async def run(self, seconds: float) -> None:
        """Look again and again, for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.look()
            except Exception as error:  # of the engine; the watch goes on as long as the server does
                self._report(f"{self._root} could not be followed ({type(error).__name__}: {error}).")

    async def look(self, *, first: bool = False) -> None:
        """One look. The ``first`` one takes folders as they are: nobody waits for a second one."""
        try:
            found = await asyncio.to_thread(scan, self._root)
        except OSError as error:
            if not self._lost:
                self._report(f"{self._root} cannot be read ({error.strerror}); what was loaded from it stays.")
            self._lost = True
            return
        self._lost = False
        for name, state in sorted(found.items()):
            if self._tried.get(name) != state and (first or self._before.get(name) == state):
                await self._take(name, state)
        for name in sorted(self._tried.keys() - found.keys() - self._before.keys()):
            await self._drop(name)
        self._failed = {name: said for name, said in self._failed.items() if name in found}
        self._before = found

    async def _take(self, name: str, state: State) -> None:
        still = "; what was loaded before stays" if name in self._served else ""
        try:
            refusal = await self._load(name, self._root / name, name in self._served)
        except Exception as error:  # no word on the adapter: the next look tries again, and says no more of the same
            said = f"{type(error).__name__}: {error}"
            if self._failed.get(name) != said:
                self._report(f"Not loaded yet from {self._root / name}: {said}{still}")
            self._failed[name] = said
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
