"""Single bits: of the header, of its length, and of numbers."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

from benchmarks.soak.malformed.case import WEIGHTS, Case, Damage, Outcome, on, refused
from benchmarks.soak.malformed.header import read, write


def cases(seed: int) -> Iterator[Case]:
    """Of the bits that a seed chooses."""
    for region, count in _REGIONS.items():
        expected = Outcome.SERVED if region == "metadata" else Outcome.REFUSED
        for number in range(count):
            flip = _flip_header(region, f"{seed} {region} {number}")
            yield Case(f"a bit of the header's {region}, {number}", flip, expected)
    for byte in range(8):
        yield refused(f"a bit of byte {byte} of the header's length", _flip_length(byte, f"{seed} {byte}"), WEIGHTS)
    for part, (bits, expected) in _BITS.items():
        for number in range(4):
            flip = _flip_tensor(bits, f"{seed} {part} {number}")
            yield Case(f"a bit of a number's {part}, {number}", flip, expected)
    yield refused("an exponent that becomes NaN or infinity", _flip_to_nan, "NaN or inf")


_REGIONS = {"names": 6, "dtypes": 4, "shapes": 4, "offsets": 4, "braces": 4, "metadata": 2}
_BITS = {
    "mantissa": (range(0, 23), Outcome.SERVED),
    "sign": (range(31, 32), Outcome.SERVED),
    "lower exponent": (range(23, 26), Outcome.SERVED),
    "highest exponent": (range(30, 31), Outcome.HARMLESS),  # 1e38 times as large
}


def _flip_length(byte: int, seed: str) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[byte] ^= 1 << random.Random(seed).randrange(8)
        path.write_bytes(content)

    return on(WEIGHTS, damage)


def _flip_header(region: str, seed: str) -> Damage:
    """One bit of one character, which stays one byte."""

    def damage(path: Path) -> None:
        rng, content = random.Random(seed), bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        place = 8 + rng.choice(_places(bytes(content[8 : 8 + length]), region))
        content[place] ^= 1 << rng.randrange(7)
        path.write_bytes(content)

    return on(WEIGHTS, damage)


def _places(header: bytes, region: str) -> list[int]:
    """Where a region's characters are in a header."""
    text = header.decode()
    places: list[int] = []
    for name, told in json.loads(text).items():
        if name == "__metadata__":
            if region == "metadata":
                start = text.index('"pt"') + 1
                places += range(start, start + 2)
            continue
        start = text.index(f'"{name}"') + 1
        behind = start + len(name)
        pieces = {
            "names": name,
            "dtypes": told["dtype"],
            "shapes": ",".join(map(str, told["shape"])),
            "offsets": ",".join(map(str, told["data_offsets"])),
        }
        if region == "names":
            places += range(start, behind)
        elif region == "braces":
            places.append(text.index("{", behind))
        elif region in pieces:
            marks = {"dtypes": '"dtype":"', "shapes": '"shape":[', "offsets": '"data_offsets":['}
            place = text.index(marks[region], behind) + len(marks[region])
            assert text.startswith(pieces[region], place)
            places += range(place, place + len(pieces[region]))
    return places


def _flip_tensor(bits: range, seed: str) -> Damage:
    def damage(folder: Path) -> None:
        rng = random.Random(seed)
        header, data = read(folder)
        numbers = bytearray(data)
        place = rng.randrange(len(numbers) // 4) * 4
        bit = rng.choice(bits)
        numbers[place + bit // 8] ^= 1 << bit % 8
        write(folder, header, bytes(numbers))

    return damage


def _flip_to_nan(folder: Path) -> None:
    """A number from 1 on and below 2, whose highest exponent bit is the only one that is not set."""
    header, data = read(folder)
    write(folder, header, struct.pack("<I", 0x7FC00001) + data[4:])
