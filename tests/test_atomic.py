"""Whatever fails while an adapter is saved, its directory holds the old one or the new one, whole."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from icarus import adapter, atomic
from icarus.errors import AdapterError
from specimens import contents, llama, specialist, whole


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A sound adapter of rank 4 on ``llama()``."""
    return adapter.save(specialist(llama()), tmp_path / "good")


def test_save_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="is a file"):
        adapter.save(specialist(llama()), tmp_path / "file")


def no_exchange(one: Path, other: Path) -> bool:
    return False


class CrashError(RuntimeError):
    """Not an error that anyone would catch on the way."""


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", ["nothing", "an adapter", "other files"])
@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_crash_leaves_the_old_adapter(
    call: str, existing: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every single call that touches the disk fails once."""
    directory = tmp_path / "adapter"
    old, new = specialist(llama(), seed=1), specialist(llama(), seed=2)
    if existing == "an adapter":
        adapter.save(old, directory)
    if existing != "nothing":
        directory.mkdir(exist_ok=True)
        (directory / "notes.txt").write_text("mine")
    before = contents(directory)
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", no_exchange)
    real = getattr(os, call)
    for countdown in range(1, 20):
        remaining = countdown

        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise CrashError
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with suppress(CrashError):
                adapter.save(new, directory)
        if remaining > 0:
            break  # fewer calls than that: the save went through
        now = contents(directory)
        if existing == "an adapter":
            assert now == before or whole(directory, new)
        else:
            assert whole(directory, new) or not adapter.is_icarus(directory)
        assert [path.name for path in tmp_path.iterdir()] in (["adapter"], [])
    assert whole(directory, new)
    assert existing == "nothing" or (directory / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_power_cut_at_the_exchange_leaves_the_old_adapter(tmp_path: Path) -> None:
    directory = adapter.save(specialist(llama(), seed=1), tmp_path / "adapter")
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from icarus import adapter, atomic
from specimens import llama, specialist
exchange = atomic._exchange
def cut(one, other):
    sys.argv[2] == "after" and exchange(one, other)
    os._exit(9)
atomic._exchange = cut
adapter.save(specialist(llama(), seed=2), sys.argv[1])
"""
    for moment, seed in (("before", 1), ("after", 2)):
        run = subprocess.run([sys.executable, "-c", code, str(directory), moment], check=False)
        assert run.returncode == 9
        assert whole(directory, specialist(llama(), seed=seed))


def test_replacing_keeps_other_files_and_drops_the_old_pickle(good: Path) -> None:
    (good / "tokenizer.json").write_text("mine")
    (good / "checkpoint-1").mkdir()
    (good / "checkpoint-1" / "adapter_config.json").write_text("older")
    (good / "adapter_model.bin").write_text("pickle")
    adapter.save(specialist(llama(), seed=3), good)
    assert (good / "tokenizer.json").read_text() == "mine"
    assert (good / "checkpoint-1" / "adapter_config.json").read_text() == "older"
    assert not (good / "adapter_model.bin").exists()
    assert whole(good, specialist(llama(), seed=3))


def test_file_system_without_links_copies(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*arguments: object) -> None:
        raise OSError("no hard links here")

    (good / "notes.txt").write_text("mine")
    monkeypatch.setattr(os, "link", no_link)
    adapter.save(specialist(llama(), seed=3), good)
    assert (good / "notes.txt").read_text() == "mine"


def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """It is not replaced by a file, which root could do."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic.write_text(pipe, "words")
    assert os.read(read, 99) == b"words"
    os.close(read)
    assert pipe.is_fifo()
