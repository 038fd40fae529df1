"""Tensors in safetensors files, each of which is read when it is asked for, and in pieces.

With plain reads: the safetensors package maps files into memory, and then the process dies (SIGBUS) when somebody
truncates the file in the meantime.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PIECE = 4 * 1024**2
"""Elements that are read, converted or hashed at once, to bound memory."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

_MAX_HEADER = 100_000_000  # bytes, as in the safetensors package

Ranges = Iterable[tuple[int, int]]  # [start, stop) of elements in row-major order


@dataclass(frozen=True)
class Stored:
    """One tensor, in a file or in memory; ``read`` gives the elements of each range, on any device."""

    shape: tuple[int, ...]
    size: int  # elements, or bytes where the type is not a floating one
    read: Callable[[Ranges], Iterator[Tensor]]
    name: str = ""
    dtype: str = ""  # as the file calls it: F32
    floating: bool = True
    bytes: int = 0

    def pieces(self) -> Iterator[Tensor]:
        """All elements, in order."""
        return self.read(pieces(self.size))


def pieces(size: int) -> Ranges:
    """Ranges that cover a tensor of this size."""
    return ((start, min(start + PIECE, size)) for start in range(0, size, PIECE))


def of_file(file: Path) -> dict[str, Stored]:
    """By the file's header (safetensors: 8 bytes of length, JSON, data), checked as the package does.

    Raises:
        OSError: it cannot be read.
        ValueError: it is truncated, or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError("the header is longer than the file or the format allows")
        begin, text = 8 + length, handle.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
        if text[:1] != b"{":
            raise ValueError("the header is no JSON object")
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not all text")
        tensors = {name: _of_entry(file, begin, name, **entry) for name, entry in header.items()}
        _check_order([entry["data_offsets"] for entry in header.values()], size - begin)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header is malformed: {error}") from error
    return tensors


def _check_order(offsets: list[list[int]], size: int) -> None:
    """The data of tensors are side by side, from the first byte behind the header to the last one of the file."""
    here = 0
    for begin, end in sorted(offsets):
        if begin != here or end < begin:
            raise ValueError("the data of its tensors overlap or leave gaps")
        here = end
    if here != size:
        raise ValueError(f"the file ends {'before' if here > size else 'behind'} its last tensor")


def _of_entry(file: Path, begin: int, name: str, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> Stored:
    first, end = data_offsets
    if not all(type(number) is int and number >= 0 for number in (*shape, first, end)):
        raise ValueError(f"a shape or an offset of {name!r:.100} is no integer")
    kind = _DTYPES.get(dtype, torch.uint8)  # bytes of integers are compared as they are
    if dtype in _DTYPES and math.prod(shape) * kind.itemsize != end - first:
        raise ValueError(f"{name!r:.100} has not the size that its shape says")

    def read(ranges: Ranges) -> Iterator[Tensor]:
        with file.open("rb", buffering=0) as handle:
            for start, stop in ranges:
                handle.seek(begin + first + start * kind.itemsize)
                data = bytearray(handle.read((stop - start) * kind.itemsize))
                if len(data) < (stop - start) * kind.itemsize:
                    raise ValueError("the file got shorter while it was read")
                yield torch.frombuffer(data, dtype=kind)

    return Stored(tuple(shape), (end - first) // kind.itemsize, read, name, dtype, dtype in _DTYPES, end - first)


def of_tensor(tensor: Tensor, name: str = "") -> Stored:
    """One in memory."""
    floating = tensor.is_floating_point()

    def read(ranges: Ranges) -> Iterator[Tensor]:
        flat = tensor.contiguous().view(-1)
        flat = flat if floating else flat.view(torch.uint8)
        return (flat[start:stop] for start, stop in ranges)

    size = tensor.numel() if floating else tensor.nbytes
    return Stored(tuple(tensor.shape), size, read, name, str(tensor.dtype), floating, tensor.nbytes)
