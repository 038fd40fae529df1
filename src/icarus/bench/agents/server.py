"""A server in a process group of its own: started, waited for, watched, and stopped whatever happens.

Works with anything that answers ``/health`` and ``/metrics``; ``systems.py`` has the command.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

from icarus.bench.logs import last_lines
from icarus.errors import IcarusError

STOP_SECONDS = 20.0
"""How long a server may take to end by itself before its processes are killed."""


class ServerFailed(IcarusError):
    """A server did not start, or ended by itself; the message has the last lines of its log."""


class Server:
    """``with Server(...) as server:`` gives a healthy server, or raises ServerFailed."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path, start_seconds: float
    ) -> None:
        """
        Args:
            command: starts the server on ``port`` of 127.0.0.1.
            environment: variables set on top of this process's own.
            log: where its output goes; an older file is replaced.
            start_seconds: how long it may take until it is healthy.
        """
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._command, self._environment, self._start_seconds = list(command), dict(environment), start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._output = self.log.open("wb")
        try:
            # A session of its own: its processes can be stopped together, and Ctrl-C reaches us first.
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raises:
        ServerFailed: the server has ended.
        """
        status = self._process.poll() if self._process else None
        if status is not None:
            raise ServerFailed(f"The server ended by itself with status {status}. {last_lines(self.log)}")

    def peak_bytes(self) -> int:
        """Peak resident memory of its processes, summed; pages that they share count once for each of them."""
        return sum(_peak_of(pid) for pid in self._members())

    def stop(self) -> None:
        """End all of its processes: asked first, killed after ``STOP_SECONDS``. Calling it again does nothing."""
        process, self._process = self._process, None
        if process:
            try:
                self._signal(process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            finally:  # also when a second Ctrl-C comes in here
                self._signal(process.pid, signal.SIGKILL)
                process.wait()
        if self._output:
            self._output.close()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline:
            self.check()
            with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.25)
        raise ServerFailed(f"The server was not healthy after {self._start_seconds:.0f} s. {last_lines(self.log)}")

    def _members(self) -> list[int]:
        """Processes of its group, orphans among them."""
        members = []
        group = self._process.pid if self._process else None
        for pid in psutil.pids():
            with suppress(ProcessLookupError):
                if os.getpgid(pid) == group:
                    members.append(pid)
        return members

    @staticmethod
    def _signal(group: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _peak_of(pid: int) -> int:
    """VmHWM of proc(5), in bytes, which psutil has not; 0 for a process that has ended, and where there is no /proc."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0
