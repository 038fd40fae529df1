"""Copies of adapters: whatever becomes of a folder, a worker reads what was verified. Needs no vLLM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from icarus.errors import AdapterError
from icarus.vllm.worker.copies import Copies, digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter(folder: Path, weights: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_text(weights)
    return folder


@pytest.fixture
def copies() -> Iterator[Copies]:
    """A worker's, which keeps files open until it is told that adapter 1 has gone."""
    copies = Copies()
    yield copies
    copies.drop(1)


def read(copies: Copies, generation: int, folder: Path, sha256: str = "") -> str:
    """The weights that a worker reads."""
    with copies.reading(1, generation, sha256 or digest(folder), lambda: folder) as here:
        return (here / WEIGHTS).read_text()


def test_an_evicted_adapter_is_read_from_its_copy(copies: Copies, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", "old")
    sha256 = digest(folder)
    assert read(copies, 1, folder) == "old"
    adapter(folder, "half")
    assert read(copies, 1, folder, sha256) == "old"
    shutil.rmtree(folder)
    assert read(copies, 1, folder, sha256) == "old"


def test_a_request_from_before_a_replacement_reads_what_is_served(copies: Copies, tmp_path: Path) -> None:
    old, new = adapter(tmp_path / "old", "old"), adapter(tmp_path / "new", "new")
    assert [read(copies, 1, old), read(copies, 2, new), read(copies, 1, old)] == ["old", "new", "new"]


def test_what_changed_since_it_was_verified_is_refused(copies: Copies, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", "old")
    sha256 = digest(folder)
    assert read(copies, 1, folder) == "old"
    adapter(folder, "other")
    with pytest.raises(AdapterError, match="changed since it was verified"):
        read(copies, 2, folder, sha256)
    shutil.rmtree(folder)
    with pytest.raises(AdapterError, match="cannot be copied"):
        read(copies, 2, folder, sha256)
    assert read(copies, 1, folder, sha256) == "old", "what was served before stays"


def test_a_failed_replacement_leaves_the_old_one(copies: Copies, tmp_path: Path) -> None:
    old, new = adapter(tmp_path / "old", "old"), adapter(tmp_path / "new", "new")
    read(copies, 1, old)
    with pytest.raises(ValueError, match="rank"), copies.reading(1, 2, digest(new), lambda: new):
        raise ValueError("its rank is too high")
    assert read(copies, 1, old) == "old"


def test_what_was_staged_is_read_whatever_becomes_of_the_folder(copies: Copies, tmp_path: Path) -> None:
    old, new = adapter(tmp_path / "old", "old"), adapter(tmp_path / "new", "new")
    read(copies, 1, old)
    sha256, before = digest(new), open_files()
    copies.stage(1, 2, sha256, lambda: new)
    assert read(copies, 1, old) == "old", "until it is asked for"
    shutil.rmtree(new)
    assert read(copies, 2, new, sha256) == "new"
    assert open_files() == before, "one copy"


def test_a_staged_copy_that_nobody_read_goes_with_the_next(copies: Copies, tmp_path: Path) -> None:
    folder, before = adapter(tmp_path / "a", "old"), open_files()
    copies.stage(1, 1, digest(folder), lambda: folder)
    copies.stage(1, 2, digest(adapter(folder, "new")), lambda: folder)
    assert open_files() == before + 2, "one copy"
    with pytest.raises(AdapterError, match="changed since it was verified"):
        copies.stage(1, 3, "other", lambda: folder)
    assert read(copies, 3, adapter(folder, "newer")) == "newer"
    assert open_files() == before + 2, "that of another generation is gone"
    copies.stage(1, 3, "", lambda: pytest.fail("it is served"))
    copies.drop(1)
    assert open_files() == before


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_nothing_is_left_behind(copies: Copies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder, before = adapter(tmp_path / "a", "old"), open_files()
    for generation in (1, 2, 3):
        read(copies, generation, folder)
        assert open_files() == before + 2, "one copy"
    with pytest.raises(AdapterError):
        read(copies, 4, folder, "other")
    assert open_files() == before + 2
    copies.drop(1)
    assert open_files() == before
    assert read(copies, 1, folder) == "old", "its id is free"
    assert list((tmp_path / "temporary").iterdir()) == [], "whenever the process ends"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_digest_is_of_both_files(tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path / "a", "old")
    before = digest(folder)
    (folder / name).write_text("changed")
    assert digest(folder) != before
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=name):
        digest(folder)


def test_a_folder_is_only_looked_for_when_it_is_copied(copies: Copies, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", "old")
    read(copies, 1, folder)
    with copies.reading(1, 1, "", lambda: pytest.fail("it was looked for")):
        pass


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_is_no_file_to_wait_for(tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path / "a", "old")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(AdapterError, match="no regular file"):
        digest(folder)
    with pytest.raises(AdapterError, match="cannot be copied"):
        Copies().stage(1, 1, "", lambda: folder)
