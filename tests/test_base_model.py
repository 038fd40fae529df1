"""From a name to a base model: what resolves, what is refused, and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from icarus import base_model
from icarus.errors import InputError
from saved import save_base


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
        (
            "nowhere",
            "'nowhere' is neither a folder nor a hub id; try 'smollm2-135m-instruct', 'smollm2-135m-wikisql' or ",
        ),
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
