"""The first process of a sandbox, run as a script: shuts every door, and runs the program that it reads from stdin.

Stands alone, so that the interpreter starts quickly: it imports the standard library, and nothing of this package. The
order matters, as each step takes away what an earlier one needed.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

_AT_FDCWD, _AT_RECURSIVE, _MOUNT_SETATTR = -100, 0x8000, 442  # linux/fcntl.h
_RDONLY, _NOSUID, _NODEV = 1, 2, 4  # linux/mount.h
_CAPABILITIES_3 = 0x20080522
_SET_SECCOMP, _SECCOMP_FILTER, _NO_NEW_PRIVS = 22, 2, 38  # linux/prctl.h

# linux/audit.h and the system calls' numbers, by machine: those that start a process, open a socket (one in the file
# system is no part of a network namespace), make memory that no limit counts (shmget) or keys, or lead around this.
_MACHINES = {
    "x86_64": (0xC000003E, {"clone": 56, "clone3": 435}, (57, 58, 41, 272, 308, 425, 101, 29, 248, 249, 250)),
    "aarch64": (0xC00000B7, {"clone": 220, "clone3": 435}, (198, 97, 268, 425, 117, 194, 217, 218, 219)),
}
_CLONE_THREAD = 0x10000
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _EAGAIN, _ENOSYS = 1, 11, 38


def _called(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _seal_files(folder: str, size: int) -> None:
    """Everything read-only and without devices, such as the user's terminal, but for an empty folder in memory."""
    attributes = struct.pack("QQQQ", _RDONLY | _NODEV, 0, 0, 0)
    found = _LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes))
    _called(found, "mount_setattr")
    options = f"size={size},nr_inodes=1000,mode=700".encode()
    _called(_LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", _NOSUID | _NODEV, options), "mount")
    os.chdir(folder)


def _limit(seconds: int, memory: int, files: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _drop_privileges() -> None:
    header, none = struct.pack("Ii", _CAPABILITIES_3, 0), bytes(24)
    _called(_LIBC.capset(header, none), "capset")
    _called(_LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def _filter_calls() -> None:
    """No second process, whoever asks (RLIMIT_NPROC is not for root), and no socket; threads are allowed."""
    if platform.machine() not in _MACHINES:
        raise OSError(f"no list of system calls for {platform.machine()}")
    machine, cloning, refused = _MACHINES[platform.machine()]

    def jump(operation: int, value: int, then: int, otherwise: int) -> bytes:
        return struct.pack("HBBI", 0x05 | operation, then, otherwise, value)

    def load(offset: int) -> bytes:
        return struct.pack("HBBI", 0x20, 0, 0, offset)

    def give(value: int) -> bytes:
        return struct.pack("HBBI", 0x06, 0, 0, value)

    equal, at_least, bits = 0x10, 0x30, 0x40
    steps = [load(4), jump(equal, machine, 1, 0), give(_KILL), load(0)]
    steps += [jump(at_least, 0x40000000, 0, 1), give(_FAIL | _EPERM)]  # x32, whose numbers are others
    steps += [jump(equal, cloning["clone3"], 0, 1), give(_FAIL | _ENOSYS)]  # callers then take clone
    for number in refused:
        steps += [jump(equal, number, 0, 1), give(_FAIL | _EPERM)]
    steps += [jump(equal, cloning["clone"], 0, 3), load(16), jump(bits, _CLONE_THREAD, 1, 0), give(_FAIL | _EAGAIN)]
    steps += [give(_ALLOW)]
    code = ctypes.create_string_buffer(b"".join(steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    _called(_LIBC.prctl(_SET_SECCOMP, _SECCOMP_FILTER, program, 0, 0), "seccomp")


def _run(task: dict[str, Any], nothing: int) -> None:
    """In a process of its own: limits do not end the first one of a namespace. ``nothing`` is /dev/null."""
    _limit(task["seconds"], task["memory"], task["files"])
    _drop_privileges()
    _filter_calls()
    verdict = os.dup(1)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    exec(compile(task["program"], "program", "exec"), {"__name__": "program"})
    os.write(verdict, task["proof"].encode())
    os._exit(0)  # threads that it left do not matter


def main() -> None:
    """Read the task, shut the doors, run the program, and say the proof if it came to its end."""
    task, nothing = json.load(sys.stdin), os.open(os.devnull, os.O_RDWR)
    _seal_files(task["folder"], task["files"])
    if os.fork() == 0:
        _run(task, nothing)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.alarm(task["seconds"] + 1)  # of wall time; the kernel ends whoever is left in the namespace
    os.wait()


if __name__ == "__main__":
    main()
