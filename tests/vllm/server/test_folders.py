"""Which adapter folders a client may name. Needs no vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from icarus.vllm.server import folders


def test_paths_are_followed_before_they_are_judged(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "inside-not"
    for folder in (inside / "a", outside / "b"):
        folder.mkdir(parents=True)
    (inside / "leads-out").symlink_to(outside / "b")
    (outside / "leads-in").symlink_to(inside / "a")
    within = [inside.resolve()]
    for path in (inside, inside / "a", outside / "leads-in", inside / "missing"):
        assert folders.permitted(str(path), within) == path.resolve()
    for path in (
        outside / "b",
        inside / "leads-out",
        inside / ".." / "inside-not",
        "owner/name",
        "~",
        "~nobody/x",
        "a\0",
    ):
        assert folders.permitted(str(path), within) is None, path
    assert folders.permitted(str(inside), []) is None


def test_a_hub_id_is_a_folder_below_this_one_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM would download it; as an absolute path it is only a folder that there is not."""
    monkeypatch.chdir(tmp_path)
    assert folders.permitted("owner/name", [tmp_path.resolve()]) == tmp_path.resolve() / "owner" / "name"


def test_allowed_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(folders.ALLOWED_VARIABLE, raising=False)
    assert folders.allowed() is None
    monkeypatch.setenv(folders.ALLOWED_VARIABLE, "")
    assert folders.allowed() == []
    monkeypatch.setenv(folders.ALLOWED_VARIABLE, f"{tmp_path}{os.pathsep}{tmp_path / 'x'}")
    assert folders.allowed() == [tmp_path.resolve(), tmp_path.resolve() / "x"]
