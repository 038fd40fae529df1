"""What users see when a process is killed, a disk is full, or a folder vanishes: measured on a running server.

The full disk is a tmpfs of its own, which only root can mount; elsewhere that part is left out and says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.soak.shop import Shop
from benchmarks.soak.surfaces import Running, running

WATCHED_SECONDS = 60.0
"""How long a server is watched after something happened to it."""


@dataclass(kw_only=True)
class Seen:
    """What was seen of one accident."""

    accident: str
    stream: str = ""
    """What became of a stream that ran, and after how many seconds."""
    request: str = ""
    """What the next request was answered."""
    health: str = ""
    server: str = ""
    """Whether the server went on, or when it ended."""
    left: str = ""
    """Processes and files that were left behind."""
    log: str = ""
    """The line that says why."""
    faults: list[str] = field(default_factory=list)


def run(
    shop: Shop,
    folder: Path,
    before: Sequence[dict[str, Any]] = (),
    most: int | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """At most so many accidents, each on a server of its own, of those that ``before`` has not; the report of all.

    ``keep`` gets the report behind each of them.
    """
    accidents: dict[str, Callable[[Shop, Path], Seen]] = {
        "worker": lambda s, f: _killed(s, f, "VLLM::Worker"),
        "engine": lambda s, f: _killed(s, f, "VLLM::EngineCore"),
        "front-end": lambda s, f: _killed(s, f, "front end"),
        "disk": _full_disk,
        "disk-at-start": _full_from_the_start,
        "folders": _vanished_folders,
        "temporary": _vanished_temporary,
    }
    rows = list(before)
    missing = [name for name in accidents if name not in {row["name"] for row in rows}]
    for name in missing[:most]:
        here = folder / name
        here.mkdir(parents=True, exist_ok=True)
        rows.append({"name": name, **vars(accidents[name](shop, here))})
        print(json.dumps(rows[-1]))
        keep(_report(rows))
    return _report(rows)


def _report(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"faults": sum(len(row["faults"]) for row in rows), "accidents": list(rows)}


# ---------------------------------------------------------------------------------------------- killed processes


class Stream:
    """A request that streams in a thread, and what became of it."""

    def __init__(self, server: Running, model: str) -> None:
        self.tokens, self.end, self.ended = 0, "", 0.0
        self.started = threading.Event()
        self._server, self._model = server, model
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.started.wait(30)

    def join(self, seconds: float) -> None:
        """Wait for its end."""
        self._thread.join(seconds)
        if not self.end:
            self.end = f"nothing for {seconds:.0f} s"

    def _read(self) -> None:
        body = {"model": self._model, "prompt": [5] * 8, "max_tokens": 240, "ignore_eos": True, "stream": True}
        try:
            with httpx.stream("POST", f"{self._server.server.url}/v1/completions", json=body, timeout=120) as reply:
                for line in reply.iter_lines():
                    self.started.set()
                    self.tokens += line.startswith("data: {")
                    if "error" in line:
                        self.end = self.end or f"an error in the stream: {line[:160]}"
                    if line == "data: [DONE]":
                        self.end = self.end or "all of it"
            self.end = self.end or "it ended without [DONE]"
        except httpx.HTTPError as error:
            self.end = self.end or f"{type(error).__name__}: {error}"
        self.ended = time.monotonic()


def _killed(shop: Shop, folder: Path, which: str) -> Seen:
    """SIGKILL while a stream runs."""
    seen = Seen(accident=f"kill -9 of the {which.removeprefix('VLLM::')}")
    temporary = folder / "temporary"
    temporary.mkdir()
    with _running(shop, folder, temporary) as server:
        top = psutil.Process(_pid(server))
        family = [top, *top.children(recursive=True)]
        names = {process.pid: _title(process) for process in family}
        victim = top if which == "front end" else next(p for p in family if names[p.pid].startswith(which))
        stream, killed = Stream(server, "sql"), time.monotonic()
        victim.kill()
        stream.join(WATCHED_SECONDS)
        seen.stream = f"{stream.end}, after {stream.ended - killed:.1f} s and {stream.tokens} tokens"
        seen.request, seen.health = _post(server), _get(server)
        seen.server = _end_of(top, killed)
        seen.left = _left({names[p.pid]: p for p in family if p != victim}, killed)
        files = [path.name for path in temporary.rglob("icarus-*")]
        if files:
            seen.faults.append(f"files are left: {', '.join(files)}")
        seen.log = _line(server, ("died", "dead", "EngineDead", "unexpectedly"))
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    return seen


def _left(family: Mapping[str, psutil.Process], since: float) -> str:
    """Which processes outlived the accident, and for how long."""
    gone: dict[str, float] = {}
    while len(gone) < len(family) and time.monotonic() - since < WATCHED_SECONDS:
        for name, process in family.items():
            if name not in gone and not _alive(process):
                gone[name] = time.monotonic() - since
        time.sleep(0.2)
    told = [f"{name} for {seconds:.0f} s" for name, seconds in gone.items() if seconds >= 1]
    told += [f"{name} for more than {WATCHED_SECONDS:.0f} s" for name in family if name not in gone]
    return ", ".join(told) or "nothing"


def _end_of(process: psutil.Process, since: float) -> str:
    """When a server ended, and how."""
    while time.monotonic() - since < WATCHED_SECONDS:
        if not _alive(process):
            return f"ended after {time.monotonic() - since:.0f} s"
        time.sleep(0.2)
    return f"goes on after {WATCHED_SECONDS:.0f} s"


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _title(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.NoSuchProcess:
        return ""
    helper = "multiprocessing's resource tracker" if any("resource_tracker" in word for word in words) else "front end"
    return words[0] if words and words[0].startswith("VLLM::") else helper


# ---------------------------------------------------------------------------------------------- disks and folders


def _full_disk(shop: Shop, folder: Path) -> Seen:
    """A temporary folder that takes some copies of adapters and then no more."""
    seen = Seen(accident="the disk of TMPDIR is full")
    with _small_disk(folder / "temporary", "1g") as temporary:
        if temporary is None:
            seen.log = "left out: no tmpfs can be mounted here"
            return seen
        with _running(shop, folder, temporary) as server:
            with (temporary / "filling").open("wb", buffering=0) as filling, contextlib.suppress(OSError):
                while True:
                    filling.write(bytes(4096))
            loaded = server.load("late", shop.folder("chat", 1))
            swapped = _swap(server, shop.folder("sql", 1))
            seen.request = f"load: {loaded.outcome}, {loaded.said}; swap: {swapped}"
            seen.server = server.disturbed() or "goes on, the old weights too"
            (temporary / "filling").unlink()
            again = _swap(server, shop.folder("sql", 0))
            seen.left = f"with room again, a swap is answered: {again}"
            if "goes on" not in seen.server or not again.startswith("200") or loaded.outcome != "refused":
                seen.faults.append("see above")
            seen.log = _line(server, ("No space",))
    return seen


def _full_from_the_start(shop: Shop, folder: Path) -> Seen:
    """Not even one copy has room."""
    seen, started = Seen(accident="the disk of TMPDIR is full at the start"), time.monotonic()
    with _small_disk(folder / "temporary", "32k") as temporary:
        if temporary is None:
            seen.log = "left out: no tmpfs can be mounted here"
            return seen
        (temporary / "filling").write_bytes(bytes(30_000))
        try:
            with _running(shop, folder, temporary) as server:
                seen.server = server.disturbed() or "goes on"
        except Exception as error:
            seen.server = f"did not start: {type(error).__name__} after {time.monotonic() - started:.0f} s"
        text = (folder / "server.log").read_text(encoding="utf-8", errors="replace")
        seen.log = next(
            (line[:300] for line in text.splitlines() if "No space" in line or "cannot be copied" in line), ""
        )
    return seen


@contextlib.contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """A folder that is a disk of its own; None where nobody may mount one."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _vanished_folders(shop: Shop, folder: Path) -> Seen:
    """Folders of adapters that are served, one slot for all, so that each request reads its adapter anew."""
    seen = Seen(accident="folders of adapters vanish while they are served")
    copied = {name: shutil.copytree(shop.folder(name, 0), folder / "copied" / name) for name in ("sql", "plain")}
    watched = folder / "watched"
    watched.mkdir()
    adapters = [f"{name}={path}" for name, path in copied.items()]
    flags = ("--max-loras", "1", "--max-cpu-loras", "1", "--adapter-dir", str(watched))
    with _running(shop, folder, folder, adapters=adapters, flags=flags) as server:
        shutil.rmtree(watched)
        shutil.rmtree(copied["sql"])
        shutil.rmtree(copied["plain"])
        time.sleep(3)
        seen.stream = "base and ICaRus: " + (server.disturbed() or "answers go on")
        asked = _post(server, "plain")
        seen.request = f"conventional: {asked}"
        time.sleep(2)
        after = server.disturbed()
        seen.server = after or "goes on"
        seen.log = _line(server, ("cannot be read", "died", "No such file", "No adapter"))
        if after:
            seen.faults.append(f"a conventional adapter whose folder vanished: {after}")
    return seen


def _vanished_temporary(shop: Shop, folder: Path) -> Seen:
    """The temporary folder itself."""
    seen = Seen(accident="the folder TMPDIR vanishes")
    temporary = folder / "temporary"
    temporary.mkdir()
    with _running(shop, folder, temporary) as server:
        shutil.rmtree(temporary)
        loaded = server.load("late", shop.folder("chat", 1))
        seen.request = f"load: {loaded.outcome}, {loaded.said}; swap: {_swap(server, shop.folder('sql', 1))}"
        seen.server = server.disturbed() or "goes on, the old weights too"
        if "goes on" not in seen.server or loaded.outcome == "broken":
            seen.faults.append(loaded.said)
        seen.log = _line(server, ("No usable temporary", "cannot be copied"))
    return seen


# ---------------------------------------------------------------------------------------------- asking


@contextlib.contextmanager
def _running(
    shop: Shop, folder: Path, temporary: Path, *, adapters: Sequence[str] = (), flags: Sequence[str] = ()
) -> Iterator[Running]:
    """A server with a temporary folder of its own."""
    named = adapters or [f"{name}={shop.folder(name, 0)}" for name in ("sql", "plain")]
    before = {name: os.environ.get(name) for name in ("TMPDIR", "VLLM_RPC_BASE_PATH")}
    os.environ |= {"TMPDIR": str(temporary), "VLLM_RPC_BASE_PATH": "/tmp"}  # of short sockets
    try:
        with running(shop.base, named, folder, *flags) as server:
            yield server
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _pid(server: Running) -> int:
    process = server.server._process
    assert process is not None
    return process.pid


def _post(server: Running, model: str = "base") -> str:
    started = time.monotonic()
    body = {"model": model, "prompt": [5] * 8, "max_tokens": 2}
    try:
        reply = httpx.post(f"{server.server.url}/v1/completions", json=body, timeout=30)
        said = f"{reply.status_code} {'' if reply.status_code == 200 else reply.text[:160]}".strip()
    except httpx.HTTPError as error:
        said = f"{type(error).__name__}"
    return f"{said}, after {time.monotonic() - started:.1f} s"


def _get(server: Running) -> str:
    try:
        return str(httpx.get(f"{server.server.url}/health", timeout=10).status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


def _swap(server: Running, folder: Path) -> str:
    body = {"lora_name": "sql", "lora_path": str(folder), "load_inplace": True}
    reply = httpx.post(f"{server.server.url}/v1/load_lora_adapter", json=body, timeout=30)
    return f"{reply.status_code} {reply.text[:200]}"


def _line(server: Running, words: Sequence[str]) -> str:
    """The first line of the log with one of these words."""
    lines = server.server.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line[:300] for line in lines if any(word in line for word in words)), "")
