"""A safetensors file is read as the safetensors package reads it, and refused where that refuses it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from icarus.adapter import stored, weights

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2, 300]),
    "d": torch.ones(2, 0),
    "e": torch.tensor(2.0, dtype=torch.float64),
}


def test_tensors_are_those_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(save(TENSORS, metadata={"format": "pt"}))
    read = stored.of_file(tmp_path / "file")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].shape == tuple(tensor.shape)
        assert read[name].bytes == tensor.nbytes
        assert read[name].floating is tensor.is_floating_point()
        whole = torch.cat([torch.empty(0), *read[name].pieces()])
        raw = tensor.flatten() if tensor.is_floating_point() else tensor.flatten().view(torch.uint8)
        assert torch.equal(whole, raw.to(whole.dtype))


def test_large_tensors_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE", 5)
    (tmp_path / "file").write_bytes(save(TENSORS))
    for tensor in (stored.of_file(tmp_path / "file")["a"], stored.of_tensor(TENSORS["a"])):
        assert [len(piece) for piece in tensor.pieces()] == [5, 5, 2]
        assert torch.equal(torch.cat(list(tensor.pieces())), torch.arange(12.0))


def accepted(content: bytes, file: Path) -> bool:
    file.write_bytes(content)
    try:
        return all(tensor.floating for tensor in stored.of_file(file).values())  # others are refused as such
    except ValueError:
        return False


WHOLE = save({name: tensor for name, tensor in TENSORS.items() if tensor.is_floating_point()})
LENGTH = int.from_bytes(WHOLE[:8], "little")


@settings(max_examples=400)
@given(
    position=st.one_of(st.integers(0, 8 + LENGTH - 1), st.integers(0, len(WHOLE) - 1)),
    value=st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789[]{}",: ABF'))),
    end=st.one_of(st.none(), st.integers(0, len(WHOLE))),
    more=st.binary(max_size=2),
)
def test_what_the_package_refuses_is_refused(
    position: int, value: int, end: int | None, more: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes are changed, cut and added."""
    content = bytearray(WHOLE)
    content[position] = value
    spoiled = bytes(content[:end]) + more
    try:
        load(spoiled)
        sound = True
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError):
        sound = False
    assert accepted(spoiled, tmp_path_factory.getbasetemp() / "spoiled") <= sound


HEADERS: dict[str, Any] = {
    "no object": [],
    "entry that is no object": {"a": 1},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
    "one field more": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}},
    "shape of floats": {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
    "shape of true": {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
    "negative shape": {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
    "another size": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "a gap": {"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}},
    "backwards": {"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}},
    "overlap": {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    },
}


@pytest.mark.parametrize(("metadata", "sound"), [({}, True), (None, True), ({"a": 7}, False), ([], False), (7, False)])
def test_metadata_are_text(metadata: Any, sound: bool, tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": metadata, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(4)
    assert accepted(content, tmp_path / "file") is sound
    if not sound:
        with pytest.raises(SafetensorError):
            load(content)


@pytest.mark.parametrize("header", HEADERS)
def test_malformed_headers(header: str, tmp_path: Path) -> None:
    text = json.dumps(HEADERS[header]).encode()
    assert not accepted(len(text).to_bytes(8, "little") + text + bytes(4), tmp_path / "file")


def test_headers_in_another_encoding_or_too_deep(tmp_path: Path) -> None:
    for text in (b" {}", "{}".encode("utf-16"), b'{"a":' + b"[" * 100_000, b"{}" + b" " * 10):
        content = len(text).to_bytes(8, "little") + text
        assert accepted(content, tmp_path / "file") is (text[:2] == b"{}")
    assert not accepted((2**63).to_bytes(8, "little") + b"{}", tmp_path / "file")


def test_a_file_that_gets_shorter_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(WHOLE)
    read = stored.of_file(tmp_path / "file")
    (tmp_path / "file").write_bytes(WHOLE[: 8 + LENGTH + 1])
    with pytest.raises(ValueError, match="got shorter"):
        list(read["a"].pieces())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 7, 11])
def test_what_is_not_finite_is_found_in_any_piece(value: float, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "PIECE", 5)
    tensor = torch.ones(12)
    assert weights.value_problem(stored.of_tensor(tensor)) == ""
    tensor[position] = value
    assert "NaN or infinity" in weights.value_problem(stored.of_tensor(tensor))
