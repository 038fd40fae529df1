"""A folder as a user has it: a base model, two adapters, turns and training data; and the command line in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from icarus import Specialists

BASE = ["--base", "base"]
TEAM = [*BASE, "--adapter", "one=one", "--adapter", "two=two"]
GENERATE = ["generate", "--turns", "turns.json"]
TURNS = [
    {"append": "abc", "model": "one", "max_new_tokens": 3},
    {"model": "two", "max_new_tokens": 2},
    {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "base",
        "max_new_tokens": 2,
        "temperature": 1,
        "seed": 4,
    },
]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from saved import save_adapter, save_base, save_rows

    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    save_adapter(folder / "one", seed=1)
    save_adapter(folder / "two", seed=2)
    (folder / "turns.json").write_text(json.dumps(TURNS))
    save_rows(folder / "data.jsonl", {"prompt": "a", "completion": "b"})
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs in the folder, and leaves it as it was."""
    monkeypatch.chdir(home)
    for name in ("TQDM_DISABLE", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "1")  # what ``main`` sets, put back afterwards
    before = sorted(home.rglob("*"))
    yield
    assert sorted(home.rglob("*")) == before, "a command left files behind"


@pytest.fixture(scope="session")
def team(home: Path) -> Specialists:
    return Specialists.load(str(home / "base"), {name: home / name for name in ("one", "two")})


def run(*words: str, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=timeout, check=False, **options
    )


def sentence(err: str) -> str:
    """The one sentence that a command says on standard error."""
    (line,) = err.splitlines()
    assert line.startswith("icarus: ")
    assert line.endswith((".", ")"))
    return line
