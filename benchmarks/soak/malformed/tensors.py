"""Values, shapes and modules of the tensors."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.malformed.case import ICARUS, WEIGHTS, Case, Damage, harmless, refused, served
from benchmarks.soak.malformed.config import edit, setting
from benchmarks.soak.malformed.files import SPARSE
from benchmarks.soak.malformed.header import Header, read, write


@dataclass(frozen=True)
class Piece:
    """A tensor of float32 numbers as it is in the file."""

    name: str
    shape: list[int]
    content: bytes

    def of(self, *parts: str) -> bool:
        """Whether its name has one of these parts."""
        return any(part in self.name for part in parts)


def cases(kind: str) -> Iterator[Case]:
    """Of a kind of adapter."""
    yield from _values()
    yield from _shapes()
    first = "layers.0.self_attn.q_proj"
    yield refused("no lora_B", _each(lambda piece: None if piece.of("lora_B") else piece), "lora_B")
    yield refused("no lora_A", _each(lambda piece: None if piece.of("lora_A") else piece), "lora_A")
    yield refused("one module missing", _each(lambda piece: None if piece.of(first) else piece), "q_proj|missing")
    yield refused("one half missing", _each(lambda piece: None if piece.of(f"{first}.lora_A") else piece), "q_proj")
    yield refused("a module that is not in the base", more_of("z_proj", (8, 128), (128, 8)), "z_proj")
    if kind == ICARUS:
        yield refused("a module that is no target", edit(lambda c: c["target_modules"].remove("o_proj")), "o_proj")
        yield refused("weights for v_proj", more_of("v_proj", (8, 128), (64, 8)), "v_proj")


def _values() -> Iterator[Case]:
    for what, value in (("NaN", math.nan), ("infinity", math.inf), ("-infinity", -math.inf)):
        yield refused(f"all {what}", _fill(value), "NaN or inf")
        for where, at in (("first", 0.0), ("middle", 0.5), ("last", 1.0)):
            yield refused(f"{what} as the {where} number", _single(value, at), "NaN or inf")
    yield refused("all of lora_B NaN", _fill(math.nan, "lora_B"), "NaN or inf")
    yield served("zeros", _fill(0.0))
    yield served("subnormal numbers", _fill(1e-45))
    for value in (1e4, 1e18, 1e38):
        yield harmless(f"all {value:.0e}", _fill(value))
        yield harmless(f"{value:.0e} as one number", _single(value, 0.5))


def _shapes() -> Iterator[Case]:
    def halved(half: str, side: int) -> Damage:
        return _each(lambda piece: _halved(piece, side) if piece.of(f"lora_{half}.weight") else piece)

    def without_rank(piece: Piece) -> Piece:
        return Piece(piece.name, [0, piece.shape[1]] if piece.of("lora_A") else [piece.shape[0], 0], b"")

    yield refused("lora_A of half the rank", halved("A", 0))
    yield refused("both halves of half the rank", _each(lambda piece: _halved(piece, piece.of("lora_B"))), "rank")
    yield refused("rank 0", _each(without_rank))
    yield refused("inputs halved", halved("A", 1))
    yield refused("outputs halved", halved("B", 0))
    yield refused("huge rank that fits together", _huge, "rank")


def more_of(module: str, *shapes: tuple[int, int]) -> Damage:
    """Weights of zeros for one more module of the first layer."""

    def damage(folder: Path) -> None:
        header, data = read(folder)
        for half, shape in zip("AB", shapes, strict=True):
            size = 4 * math.prod(shape)
            name = f"base_model.model.model.layers.0.self_attn.{module}.lora_{half}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
            data += bytes(size)
        write(folder, header, data)

    return damage


def _each(change: Callable[[Piece], Piece | None]) -> Damage:
    """Every tensor through ``change``, and the file anew; None leaves it out."""

    def damage(folder: Path) -> None:
        header, data = read(folder)
        fresh, body = {name: told for name, told in header.items() if name == "__metadata__"}, b""
        for name in sorted(header.keys() - fresh.keys(), key=lambda name: header[name]["data_offsets"]):
            start, end = header[name]["data_offsets"]
            changed = change(Piece(name, header[name]["shape"], data[start:end]))
            if changed is not None:
                place = [len(body), len(body) + len(changed.content)]
                fresh[changed.name] = {"dtype": "F32", "shape": changed.shape, "data_offsets": place}
                body += changed.content
        write(folder, fresh, body)

    return damage


def _fill(value: float, part: str = "") -> Damage:
    def fill(piece: Piece) -> Piece:
        numbers = len(piece.content) // 4
        return Piece(piece.name, piece.shape, struct.pack("<f", value) * numbers) if piece.of(part) else piece

    return _each(fill)


def _single(value: float, at: float) -> Damage:
    """One number of one tensor, at that part of its way."""

    def change(piece: Piece) -> Piece:
        if not piece.of("layers.0.self_attn.q_proj.lora_B"):
            return piece
        place = int(at * (len(piece.content) // 4 - 1)) * 4
        changed = piece.content[:place] + struct.pack("<f", value) + piece.content[place + 4 :]
        return Piece(piece.name, piece.shape, changed)

    return _each(change)


def _halved(piece: Piece, side: int) -> Piece:
    shape = list(piece.shape)
    shape[side] //= 2
    return Piece(piece.name, shape, piece.content[: 4 * math.prod(shape)])


def _huge(folder: Path) -> None:
    """Of a rank that takes gigabytes, as the config says it; a file with a hole, so that it takes no room."""
    header, _ = read(folder)
    rank, at = SPARSE // 4 // 256, 0
    fresh: Header = {}
    for name in sorted(name for name in header if "layers.0.self_attn.q_proj" in name):
        outside = header[name]["shape"][1 if "lora_A" in name else 0]
        shape = [rank, outside] if "lora_A" in name else [outside, rank]
        fresh[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * rank * outside]}
        at += 4 * rank * outside
    write(folder, fresh, b"")
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + at)
    setting(r=rank, target_modules=["q_proj"])(folder)
