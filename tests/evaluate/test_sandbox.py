"""What a program that a model wrote can do: end well, or not. Each door is tried from within."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from icarus.errors import InputError
from icarus.evaluate import Item, Task, sandbox
from icarus.evaluate.sandbox import Limits, passes
from icarus.evaluate.scorers import SCORERS
from strict_skips import NO_NAMESPACES

FEW = Limits(seconds=2, memory=256 * 1024**2, files=1024**2)


def _namespaces() -> bool:
    """Whether ``unshare`` works: not outside of Linux, nor in most containers."""
    try:
        return subprocess.run([*sandbox._UNSHARE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


linux = pytest.mark.skipif(not _namespaces(), reason=NO_NAMESPACES)


@linux
@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("import collections, math, random, typing", True),
        ("import asyncio; asyncio.run(asyncio.sleep(0))", True),
        ("import threading as t; a = t.Thread(target=print); a.start(); a.join()", True),
        ("open('x', 'w').write('hi'); assert open('x').read() == 'hi'", True),
        ("print('x' * 10**7)", True),
        ("assert 1 + 1 == 3", False),
        ("def f(:", False),
        ("import sys; sys.exit(0)", False),  # the tests behind it did not run
        ("import os; os._exit(0)", False),
        ("import os; os.write(1, bytes(64)); os._exit(0)", False),
    ],
)
def test_a_right_program_passes_and_a_wrong_one_does_not(program: str, passed: bool) -> None:
    assert passes(program, Limits()) == passed


DONE = "\nopen(DONE, 'w')"
CONTAINED = {
    "an endless loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "memory": "[bytearray(10**7) for _ in range(100)]",
    "one large file": "open('x', 'wb').write(bytes(3 * 1024**2))",
    "many files": "[open(str(n), 'wb').write(bytes(10**5)) for n in range(30)]",
    "many empty files": "[open(str(n), 'wb').close() for n in range(2000)]",
    "open files": "a = [open('x', 'w') for n in range(100)]",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "another program": "import subprocess; subprocess.run(['true'], check=True)",
    "many threads": "import threading as t, time\nfor n in range(999): t.Thread(target=time.sleep, args=[9]).start()",
    "a socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a file elsewhere": "open(PLACE, 'w')",
    "a device": "open('/dev/zero', 'rb')",
    "shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0",
    "a file in /tmp": "open('/tmp/icarus-was-here', 'w')",
    "more rights": "import os; os.setuid(1)",
    "another mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/mnt', b'tmpfs', 0, b'') == 0",
    "its own folder undone": "import ctypes, os; assert ctypes.CDLL(None).umount2(os.getcwd().encode(), 2) == 0",
    "higher limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
    "the secret": "import os; os.environ['ICARUS_SECRET']",
    "the secret of a parent": "any(b'SECRET' in open(f'/proc/{p}/environ', 'rb').read() for p in PIDS) or 1 / 0",
    "other processes": "import os; assert len([p for p in os.listdir('/proc') if p.isdigit()]) > 2",
    "an end to all": "import os; os.kill(-1, 9)",
}


@linux
@pytest.mark.parametrize("attempt", CONTAINED)
def test_a_program_is_contained(attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICARUS_SECRET", "x")
    head = f"PLACE = {str(tmp_path / 'x')!r}; PIDS = [1, 2, {os.getpid()}]\n"
    assert not passes(head + CONTAINED[attempt], FEW)
    assert not list(tmp_path.iterdir())


@linux
def test_what_a_program_says_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the number of the verdict's file, which a program can find; a pipe would fill the evaluator's memory."""
    flood = (
        "import os\nfor n in range(3, 64):\n try:\n  for _ in range(4): os.write(n, bytes(2**20))\n except OSError: 0"
    )
    sizes, begin = [], sandbox._begin

    def watched(file: IO[bytes], count: int) -> str:
        sizes.append(os.fstat(file.fileno()).st_size)
        return begin(file, count)

    monkeypatch.setattr(sandbox, "_begin", watched)
    assert not passes(flood, FEW)
    assert max(sizes) == FEW.files


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


@linux
def test_a_program_reaches_no_listener_on_this_machine(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    program = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)"
    subprocess.run([sys.executable, "-c", program], check=True)
    listener.accept()[0].close()
    assert not passes(program, FEW)
    with pytest.raises(BlockingIOError):
        listener.accept()


@linux
def test_without_its_list_of_calls_the_namespaces_still_have_no_network(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two doors one behind the other; a jail without the second shows that the first is shut."""
    jail = tmp_path / "jail.py"
    jail.write_text(sandbox._JAIL.read_text().replace("    _filter_calls()\n", ""))
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    assert passes("import socket; socket.socket()", FEW)
    address = listener.getsockname()
    assert not passes(f"import socket; socket.create_connection({address!r}, timeout=1)", FEW)


@linux
@pytest.mark.parametrize(
    ("step", "attempt"),
    [
        ("_seal_files(task['folder'], task['files'])", "a file elsewhere"),
        ("_limit(task['seconds'], task['memory'], task['files'])", "memory"),
        ("_drop_privileges()", "its own folder undone"),
        ("_filter_calls()", "another program"),
    ],
)
def test_each_step_is_what_contains_it(
    step: str, attempt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sandbox._JAIL.read_text()
    step = step.replace("'", '"')
    assert text.count(f"    {step}\n") == 1
    jail = tmp_path / "jail.py"
    jail.write_text(text.replace(f"    {step}\n", ""))
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    head = f"PLACE = {str(tmp_path / 'x')!r}\n"
    assert passes(head + CONTAINED[attempt], FEW)


def test_where_there_are_no_namespaces_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.check.cache_clear()
    for command in (["no-such-unshare"], ["false"]):
        monkeypatch.setattr(sandbox, "_UNSHARE", command)
        with pytest.raises(InputError, match=r"^Programs cannot be run here, .* namespaces .*; leave out tasks"):
            passes("pass")
    sandbox.check.cache_clear()


def code_task() -> Task:
    row = {"prompt": "def f():\n", "completion": "    return 1"}
    return Task(name="code", scorer="code", items=[Item(name="a", row=row, reference="assert f() == 1")])


@linux
def test_the_scorer_runs_prompt_answer_and_tests() -> None:
    tests = "assert double(2) == 4"
    reference = {"before": "def double(x):\n", "after": tests}
    assert SCORERS["code"]("    return 2 * x", reference) == 1
    assert SCORERS["code"]("    return 3 * x", reference) == 0
    assert SCORERS["code"]("So:\n```python\ndef double(x):\n    return x + x\n```\nYes.", tests) == 1
    assert SCORERS["code"]("    return 2 * x", tests) == 0


def test_without_the_flag_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "check", lambda: pytest.fail("it ran"))
    with pytest.raises(InputError, match=r"^Task code runs programs .* --confirm-run-unsafe-code"):
        code_task().check_confirmed(confirm_run_unsafe_code=False)
    with pytest.raises(InputError, match="needs a text of tests, or texts 'before' and 'after' as reference"):
        Task(
            name="code",
            scorer="code",
            items=[Item(name="a", row={"prompt": "a", "completion": "b"}, reference={"behind": "x"})],
        )
