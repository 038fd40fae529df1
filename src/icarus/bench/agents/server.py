"""A server in a process group of its own: started, waited for, watched, and stopped whatever happens.

Works with anything that answers ``/health`` and ``/metrics``; ``systems.py`` has the command.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from icarus.bench.measure import peak_bytes
from icarus.errors import IcarusError

STOP_SECONDS = 20.0
"""How long a server may take to end by itself before its processes are killed."""


class ServerFailed(IcarusError):
    """A server did not start, or ended by itself; the message has the last lines of its log."""


@dataclass
class Server:
    """``with Server(...) as server:`` gives a healthy server, or raises ServerFailed."""

    command: Sequence[str]  # starts it on ``port`` of 127.0.0.1
    environment: Mapping[str, str]  # variables set on top of this process's own
    port: int
    log: Path  # where its output goes; an older file is replaced
    start_seconds: float  # how long it may take until it is healthy
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            # A session of its own: its processes can be stopped together, and Ctrl-C reaches us first.
            self._process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def check(self, timeout_s: float = 0.0) -> None:
        """Wait for its end for that long.

        Raises:
            ServerFailed: it has ended.
        """
        with suppress(subprocess.TimeoutExpired):
            if self._process:
                status = self._process.wait(timeout_s)
                raise ServerFailed(f"The server ended by itself with status {status}. {last_lines(self.log)}")

    def peak_bytes(self) -> int:
        """Peak resident memory of its processes, orphans among them; pages that they share count once for each."""
        return sum(peak_bytes(pid) for pid in psutil.pids() if self._process and _group(pid) == self._process.pid)

    def stop(self) -> None:
        """End all of its processes: asked first, killed after ``STOP_SECONDS``. Calling it again does nothing."""
        process, self._process = self._process, None
        if process:
            try:
                _signal(process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            finally:  # also when a second Ctrl-C comes in here
                _signal(process.pid, signal.SIGKILL)
                process.wait()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            self.check()
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.25)
        raise ServerFailed(f"The server was not healthy after {self.start_seconds:.0f} s. {last_lines(self.log)}")


def last_lines(log: Path, count: int = 15) -> str:
    """The last lines of a log, as a part of a message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    return "\n  ".join([f"The last lines of {log}:", *lines])


def _group(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
