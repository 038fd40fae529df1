"""The header of ``adapter_model.safetensors``: its length, and what it says of the tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.soak.malformed.case import WEIGHTS, Case, Damage, refused, served

Header = dict[str, Any]
Told = dict[str, Any]  # of one tensor: dtype, shape, data_offsets


def cases() -> Iterator[Case]:
    """Lengths, whole headers, and what one tensor is said to be."""
    yield from _lengths()
    yield from _whole()
    yield from _of_one()
    yield from _names()


def read(folder: Path) -> tuple[Header, bytes]:
    """Header and tensors of a safetensors file."""
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(folder: Path, header: Header | bytes, data: bytes) -> None:
    """The file anew."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def _lengths() -> Iterator[Case]:
    for length in (0, 1, 7, 10**8 + 1, 2**63, 2**64 - 1):
        yield refused(f"header length {length}", _length(length), WEIGHTS)
    for more in (-8, -1, 1, 8):
        yield refused(f"header length {more:+}", _length(more=more), WEIGHTS)


def _whole() -> Iterator[Case]:
    def whole(text: bytes) -> Damage:
        return lambda folder: write(folder, text, b"")

    yield refused("header deep", whole(b"[" * 100_000), WEIGHTS)
    yield refused("header deep and whole", whole(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), WEIGHTS)
    yield refused("header of 101 MB", whole(b"{" + b" " * 101_000_000 + b"}"))
    yield refused("header with 100,000 tensors of no size", _many)
    yield refused("no tensors", whole(b"{}"))
    yield refused("metadata alone", whole(b'{"__metadata__":{"format":"pt"}}'))
    yield refused("metadata that is no text", _header(lambda h: h.update(__metadata__={"format": 7})))
    yield served("no metadata", _header(lambda h: h.pop("__metadata__", None)))
    yield served("metadata of another framework", _header(lambda h: h.update(__metadata__={"format": "tf"})))
    yield refused("offsets of another tensor", _header(_overlap))
    yield refused("one tensor not mentioned", _header(lambda h: h.pop(_first(h))))


def _of_one() -> Iterator[Case]:
    dtypes: list[Any] = ["I32", "U32", "BOOL", "F33", "f32", "", 7, None, "F64", "BF16", "C64"]
    for dtype in dtypes:
        yield refused(f"dtype {dtype!r} of one tensor", _one(_said(dtype=dtype)))
    yield refused("shape turned", _one(lambda t: {"shape": t["shape"][::-1]}))
    yield refused("shape flat", _one(lambda t: {"shape": [t["shape"][0] * t["shape"][1]]}))
    yield refused("shape of three dimensions", _one(lambda t: {"shape": [*t["shape"], 1]}))
    yield refused("shape with -1", _one(lambda t: {"shape": [-1, t["shape"][1]]}), WEIGHTS)
    yield refused("shape whose product overflows", _one(lambda _: {"shape": [2**62, 4]}), WEIGHTS)
    yield refused("shape too large", _one(lambda t: {"shape": [t["shape"][0] + 1, t["shape"][1]]}), WEIGHTS)
    yield refused("offsets turned", _one(lambda t: {"data_offsets": t["data_offsets"][::-1]}), WEIGHTS)
    beyond = _one(lambda t: {"data_offsets": [place + 2**40 for place in t["data_offsets"]]})
    yield refused("offsets beyond the end", beyond, WEIGHTS)


def _names() -> Iterator[Case]:
    prefix = "base_model.model."
    yield refused("names of another prefix", _renamed(lambda n: n.replace(prefix, "language_model."), all_of_them=True))
    yield refused("names without a prefix", _renamed(lambda n: n.removeprefix(prefix), all_of_them=True))
    yield refused("names with a prefix more", _renamed(lambda n: prefix + n, all_of_them=True))
    default = _renamed(lambda n: n.replace(".weight", ".default.weight"), all_of_them=True)
    yield refused("names with an adapter's name", default)
    yield refused("name of a layer that is not there", _renamed(lambda n: n.replace(".0.", ".99.")))
    yield refused("name of no module", _renamed(lambda _: "nonsense"))
    yield refused("name that is empty", _renamed(lambda _: ""))
    yield refused("name of 100,000 letters", _renamed(lambda n: n + "x" * 100_000))
    yield refused("name with a line break", _renamed(lambda n: n + "\nicarus: all is well"))
    yield refused("name that no terminal can show", _renamed(lambda n: n + "\ud800"))
    yield refused("name in capitals", _renamed(str.upper))
    yield refused("name with a DoRA part", _renamed(lambda n: n.replace("lora_A.weight", "lora_magnitude_vector")))


def _length(length: int | None = None, *, more: int = 0) -> Damage:
    """What the file says is the length of its header."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / WEIGHTS).read_bytes())
        (real,) = struct.unpack("<Q", content[:8])
        content[:8] = struct.pack("<Q", real + more if length is None else length)
        (folder / WEIGHTS).write_bytes(content)

    return damage


def _header(change: Callable[[Header], object]) -> Damage:
    def damage(folder: Path) -> None:
        header, data = read(folder)
        change(header)
        write(folder, header, data)

    return damage


def _one(change: Callable[[Told], Told]) -> Damage:
    """What the header says of one tensor."""
    return _header(lambda header: header[_first(header)].update(change(header[_first(header)])))


def _said(**fields: Any) -> Callable[[Told], Told]:
    return lambda _: fields


def _first(header: Header) -> str:
    return next(name for name in sorted(header) if name.endswith("0.self_attn.o_proj.lora_A.weight"))


def _renamed(change: Callable[[str], str], *, all_of_them: bool = False) -> Damage:
    def rename(header: Header) -> None:
        for name in [name for name in header if name != "__metadata__"] if all_of_them else [_first(header)]:
            header[change(name)] = header.pop(name)

    return _header(rename)


def _many(folder: Path) -> None:
    header, data = read(folder)
    empty = {"dtype": "F32", "shape": [0, 8], "data_offsets": [0, 0]}
    write(folder, {**header, **{f"x{number}": empty for number in range(100_000)}}, data)


def _overlap(header: Header) -> None:
    """Two tensors of one shape have the same place, and the place of one is nobody's."""
    first = _first(header)
    others = [name for name in header if name not in (first, "__metadata__")]
    twin = next(name for name in others if header[name]["shape"] == header[first]["shape"])
    header[first]["data_offsets"] = header[twin]["data_offsets"]
