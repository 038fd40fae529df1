"""Programs that a model wrote, run so that all they can do is end: well, or not.

util-linux' ``unshare`` starts an interpreter in namespaces of its own: no network, no sight of other processes, and a
file system that it may change. ``jail.py`` makes that read-only but for a small folder in memory, sets limits, gives up
all privileges, and runs the program. Nothing of the environment is passed on, and nothing comes back but the verdict.

It keeps a program from doing harm, and not from cheating: the verdict comes from the program's own process, so one that
looks for it there can forge it, as with other harnesses of this kind.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from icarus.errors import InputError

_JAIL = Path(__file__).with_name("jail.py")
_UNSHARE = "unshare --user --map-root-user --net --mount --pid --ipc --uts --fork --kill-child --mount-proc".split()
_START_S = 20.0
"""Beside the program's own seconds, for a busy machine to start an interpreter."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use; it is one process."""

    seconds: int = 10
    """Of processor time, and of wall time."""
    memory: int = 1024**3
    """Bytes of address space."""
    files: int = 16 * 1024**2
    """Bytes of all files that it writes."""


def passes(program: str, limits: Limits = Limits()) -> bool:
    """Whether a Python program runs to its end without an exception, within the limits.

    Raises:
        InputError: this machine has no such namespaces.
    """
    check()
    return _run(program, limits)[0]


@functools.cache
def check() -> None:
    """See that a program that does nothing passes: else all would fail here, and look wrong.

    Raises:
        InputError: it does not, as this machine has no such namespaces.
    """
    passed, error = _run("import math, json, re, collections\n", Limits(seconds=30))
    if not passed:
        raise InputError(
            f"Programs cannot be run here, as this system gives them no namespaces of their own ({error}); leave out "
            "tasks with scorer 'code', or run them on Linux where unprivileged user namespaces are allowed."
        )


def _run(program: str, limits: Limits) -> tuple[bool, str]:
    """Whether it passed, and what was said of a jail that could not be built."""
    if sys.platform != "linux":
        return False, sys.platform
    proof = secrets.token_hex(16)  # which the jail says when the program is at its end; exit statuses can be anybody's
    # What it says goes to files, as a pipe has no end, and Limits.files holds for files.
    with tempfile.TemporaryDirectory() as folder, TemporaryFile() as said, TemporaryFile() as errors:
        task = json.dumps({"program": program, "folder": folder, "proof": proof, **asdict(limits)})
        try:
            process = subprocess.Popen(
                [*_UNSHARE, sys.executable, "-I", "-B", str(_JAIL)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=errors,
                cwd=folder,
                env={"TMPDIR": folder, "OMP_NUM_THREADS": "1", "PATH": os.defpath},
                start_new_session=True,
            )
        except OSError as error:
            return False, f"unshare: {error.strerror}"
        try:
            process.communicate(task.encode(), timeout=limits.seconds + _START_S)
        except subprocess.TimeoutExpired:
            return False, "it took too long"
        finally:
            if process.poll() is None:
                _kill(process)
        passed = _begin(said, len(proof) + 1) == proof
        return passed, (_begin(errors, 4096).strip().splitlines() or ["no reason"])[-1]


def _begin(file: IO[bytes], count: int) -> str:
    file.seek(0)
    return file.read(count).decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The first process of the namespace dies with ``unshare``, and all others with that one."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
