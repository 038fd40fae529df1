"""A folder is followed: names come and go with what is in it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from icarus.vllm.server import watch


class Follower:
    """A watched folder, and what was called."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, self.refusal = root, list[Any](), ""
        self.failure: Exception | None = None
        root.mkdir()
        self.said: list[str] = []
        self.watcher = watch.Watcher(root, self.load, self.unload, self.said.append)

    async def load(self, name: str, folder: Path, replaces: bool) -> str:
        assert folder == self.root / name
        self.calls.append(("replace" if replaces else "load", name))
        if self.failure:
            raise self.failure
        return self.refusal

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))

    def write(self, name: str, content: str, file: str = "adapter_model.safetensors") -> None:
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / file).write_text(content)

    def complete(self, name: str, content: str = "1") -> None:
        self.write(name, content)
        self.write(name, "{}", "adapter_config.json")

    def look(self, **options: bool) -> list[Any]:
        """What one look does."""
        self.calls = []
        asyncio.run(self.watcher.look(**options))
        return self.calls


@pytest.fixture
def follower(tmp_path: Path) -> Follower:
    return Follower(tmp_path / "adapters")


def test_names_come_and_go_with_folders(follower: Follower) -> None:
    follower.complete("a")
    assert [follower.look() for _ in range(3)] == [[], [("load", "a")], []]
    follower.complete("a", "changed")
    assert [follower.look() for _ in range(3)] == [[], [("replace", "a")], []]
    shutil.rmtree(follower.root / "a")
    assert [follower.look() for _ in range(3)] == [[], [("unload", "a")], []]
    follower.complete("a")
    assert [follower.look() for _ in range(3)] == [[], [("load", "a")], []]
    assert follower.said == []


def test_the_first_look_takes_what_is_there(follower: Follower) -> None:
    follower.complete("b")
    follower.complete("a")
    assert follower.look(first=True) == [("load", "a"), ("load", "b")]
    assert follower.look() == []


def test_half_written_folders_are_ignored(follower: Follower) -> None:
    follower.write("a", "1")
    (follower.root / "file").write_text("")
    assert [follower.look() for _ in range(2)] == [[], []]
    follower.complete("a", "12")
    assert follower.look() == []
    follower.write("a", "123")
    assert [follower.look() for _ in range(2)] == [[], [("load", "a")]]
    follower.complete(".a.0123.tmp")
    assert [follower.look() for _ in range(2)] == [[], []]


def test_a_folder_that_is_swapped_is_not_gone(follower: Follower) -> None:
    follower.complete("a")
    follower.look(first=True)
    (follower.root / "a").rename(follower.root / ".a.old")
    assert follower.look() == []
    (follower.root / ".a.old").rename(follower.root / "a")
    assert [follower.look() for _ in range(2)] == [[], []]


def test_a_refusal_is_said_once_for_each_state(follower: Follower) -> None:
    follower.complete("a")
    follower.look(first=True)
    follower.refusal = "it is of another base model."
    follower.complete("a", "changed")
    assert [follower.look() for _ in range(4)] == [[], [("replace", "a")], [], []]
    assert len(follower.said) == 1
    assert "another base model" in follower.said[0]
    assert "what was loaded before stays" in follower.said[0]
    follower.refusal = ""
    follower.complete("a", "changed again")
    assert [follower.look() for _ in range(2)] == [[], [("replace", "a")]]


def test_what_failed_without_a_word_on_the_adapter_is_tried_again(follower: Follower) -> None:
    follower.complete("a")
    follower.failure = ConnectionError("busy")
    assert [follower.look(first=True), follower.look(), follower.look()] == [[("load", "a")]] * 3
    assert len(follower.said) == 1
    assert "busy" in follower.said[0]
    follower.failure = None
    assert [follower.look() for _ in range(2)] == [[("load", "a")], []]


def test_what_was_never_served_is_not_unloaded(follower: Follower) -> None:
    follower.refusal = "no."
    follower.complete("a")
    follower.look(first=True)
    shutil.rmtree(follower.root / "a")
    assert [follower.look() for _ in range(3)] == [[], [], []]


def test_a_root_that_is_gone_takes_nothing_away(follower: Follower) -> None:
    follower.complete("a")
    follower.look(first=True)
    follower.root.rename(follower.root.with_name("away"))
    assert [follower.look() for _ in range(3)] == [[], [], []]
    assert len(follower.said) == 1
    follower.root.with_name("away").rename(follower.root)
    assert [follower.look() for _ in range(3)] == [[], [], []]
