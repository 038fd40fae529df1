"""An engine under test as a process: it gets one JSON object a line and answers each with one line.

What runs in it is ``engine.py``, which imports vLLM; nothing else here does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from icarus.bench.agents.server import last_lines
from icarus.errors import IcarusError

COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("engine.py")))


class EngineFailed(IcarusError):
    """An engine under test ended, or answered with an error; the message has the end of its log."""


class EngineProcess:
    """Starts the process and keeps it until the block ends. What it prints is in ``log``."""

    def __init__(self, name: str, log: Path, environment: Mapping[str, str], command: Sequence[str] = COMMAND) -> None:
        self.name, self.log = name, log
        with log.open("w", encoding="utf-8") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=dict(environment),
                text=True,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends everything in order
            )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process and all that it started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a command that it never read
                pipe.close()

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Send one command and wait for its answer, however long that takes. Raises EngineFailed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise EngineFailed(f"The engine {self.name!r} ended with status {status}. {last_lines(self.log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"The engine {self.name!r} failed ({answer['error']}). {last_lines(self.log)}")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that the process has used, in all of its threads."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)
