"""A worker reads copies of adapters that share, and their folders for all others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icarus import adapter
from icarus.errors import AdapterError
from strict_skips import WITHOUT_VLLM
from tiny_models import tiny

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.lora.request import LoRARequest

from icarus.vllm.marks import SharedLoRARequest, VerifiedLoRARequest
from icarus.vllm.worker import adapters
from icarus.vllm.worker.copies import digest

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    adapter.save(adapter.attach(tiny(), rank=2), folder / "ours")
    adapter.save_conventional(adapter.attach_conventional(tiny(), rank=2), folder / "plain")
    return folder


class Reader:
    """vLLM's manager of a worker's adapters, and what it read: path and weights."""

    def __init__(self) -> None:
        self.read: list[tuple[str, bytes]] = []
        self._adapter_manager = "what applies them"

    def original(self, request: Any) -> str:
        self.read.append((request.lora_path, Path(request.lora_path, WEIGHTS).read_bytes()))
        return f"reading {len(self.read)}"

    _load_adapter = adapters.wrap_load_adapter(original)

    def load(self, request: Any) -> str:
        return self._load_adapter(request)


@pytest.fixture(autouse=True)
def placed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adapters that vLLM was asked about; one called "misplaced" is refused."""
    asked: list[str] = []

    def check_placed(manager: Any, lora: Any, name: str) -> None:
        assert manager == "what applies them"
        asked.append(lora)
        if name == "misplaced":
            raise AdapterError("it has weights for nothing")

    monkeypatch.setattr(adapters, "check_placed", check_placed)
    return asked


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    adapters._copies(reader).drop(1)


def shared(folder: Path, **fields: Any) -> SharedLoRARequest:
    sha256 = digest(folder) if folder.exists() else ""
    return SharedLoRARequest(
        **{"lora_name": "a", "lora_int_id": 1, "lora_path": str(folder), "sha256": sha256} | fields
    )


def test_what_shares_is_read_from_a_copy(reader: Reader, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder / "ours", tmp_path / "moved")
    request = shared(moved, generation=1)
    reader.load(request)
    shutil.rmtree(moved)
    reader.load(request)
    whole = (folder / "ours" / WEIGHTS).read_bytes()
    assert [weights for _, weights in reader.read] == [whole, whole]
    assert str(moved) not in {path for path, _ in reader.read}


def test_a_copy_goes_with_its_adapter(reader: Reader, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder / "ours", tmp_path / "moved")
    request = shared(moved, generation=1)
    reader.load(request)
    shutil.rmtree(moved)
    remove = adapters.wrap_remove_lora(lambda self, lora_id: True)
    assert remove(SimpleNamespace(lora_manager=reader), 1)
    with pytest.raises(AdapterError, match="cannot be copied"):
        reader.load(request)


def test_a_conventional_adapter_is_read_from_a_copy_too(reader: Reader, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder / "plain", tmp_path / "moved")
    request = VerifiedLoRARequest("b", 1, str(moved), sha256=digest(moved), generation=1)
    reader.load(request)
    shutil.rmtree(moved)
    reader.load(request)
    assert [weights for _, weights in reader.read] == [(folder / "plain" / WEIGHTS).read_bytes()] * 2


def test_what_vllm_makes_for_warm_up_is_not_copied(reader: Reader, folder: Path) -> None:
    reader.load(LoRARequest(lora_name="b", lora_int_id=2, lora_path=str(folder / "plain")))
    assert [path for path, _ in reader.read] == [str(folder / "plain")]


def test_what_was_staged_is_read_once(reader: Reader, folder: Path, placed: list[str]) -> None:
    first, second = (shared(folder / "ours", generation=generation) for generation in (1, 2))
    assert adapters.stage(worker_of(reader), first) == ""
    assert [reader.load(first), reader.load(first)] == ["reading 1", "reading 2"]
    assert adapters.stage(worker_of(reader), first) == "", "it is served"
    assert adapters.stage(worker_of(reader), second) == ""
    assert reader.load(first) == "reading 4", "a request that waited, of what is served now"
    assert reader.load(second) == "reading 5", "which was not what was staged last"
    assert placed == [f"reading {number}" for number in range(1, 6)]


def test_what_vllm_cannot_apply_is_the_answer(reader: Reader, folder: Path) -> None:
    misplaced = shared(folder / "ours", generation=1, lora_name="misplaced")
    assert adapters.stage(worker_of(reader), misplaced) == f"{adapters.REFUSED}it has weights for nothing"
    with pytest.raises(AdapterError, match="for nothing"):
        reader.load(misplaced)
    assert adapters._copies(reader)._kept == {}, "a copy stays when it was read"


def test_a_staged_copy_is_read_whatever_becomes_of_the_folder(reader: Reader, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder / "ours", tmp_path / "moved")
    request = shared(moved, generation=1)
    assert adapters.stage(worker_of(reader), request) == ""
    shutil.rmtree(moved)
    reader.load(request)
    assert len(reader.read) == 1


def test_an_unstaged_copy_is_gone(reader: Reader, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder / "ours", tmp_path / "moved")
    request = shared(moved, generation=1)
    adapters.stage(worker_of(reader), request)
    adapters.unstage(worker_of(reader), 1)
    shutil.rmtree(moved)
    with pytest.raises(AdapterError, match="cannot be copied"):
        reader.load(request)


def test_why_a_worker_cannot_copy_is_its_answer(reader: Reader, tmp_path: Path) -> None:
    """An exception would leave the answers of other workers in their queues."""
    reason = adapters.stage(worker_of(reader), shared(tmp_path / "gone", generation=1))
    assert "cannot be copied" in reason


def worker_of(manager: Reader) -> Any:
    return SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager, _ensure_lora_enabled=lambda: None))
