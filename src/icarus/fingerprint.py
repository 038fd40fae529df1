"""The identity of a base model: one hash of the weights that write the KV cache.

Specialists may share a cache only if they were trained over the very weights that write it, so an adapter carries the
fingerprint of its base model. What this file promises:

* equal for float32 and bfloat16 copies (values are rounded to bfloat16 first), for one file, shards, or a loaded model
  (with or without adapters), on any device, in any order of tensors, with a tied ``lm_head`` stored or not;
* different when any base weight differs by more than that rounding. ``lm_head`` does not write KV and never counts.
  Up to ``FULL_HASH_LIMIT`` elements every element is read; above it, see ``fingerprint`` for what is not.

It needs no modelling code for folders (the vLLM plugin uses it there). For a loaded Transformers model it asks
Transformers to undo the conversions made at loading (for example experts merged into one tensor), so that names and
shapes are the checkpoint's, as ``save_pretrained`` would write them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from icarus.errors import InputError

FULL_HASH_LIMIT = 512 * 1024**2
"""Elements; larger models are sampled."""

SAMPLE_RUNS, SAMPLE_RUN = 64, 1024
"""Sample of a tensor: evenly spaced runs of consecutive elements, 65,536 in all. Runs and not single elements, because
those would touch every page of the file and so read all of it."""

_CHUNK = 4 * 1024**2  # elements converted and hashed at once, to bound memory
_DOMAIN = b"icarus-base-1"
_HEADS = {"lm_head", "embed_out"}
# Buffers that old checkpoints store and Transformers ignores on loading.
_IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class _Weight:
    """One named tensor; ``read(start, stop)`` gives its elements in row-major order, on any device."""

    name: str
    shape: tuple[int, ...]
    size: int  # elements, or bytes where the type is not a floating one
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def fingerprint(source: nn.Module | StrPath) -> str:
    """Hex fingerprint (64 digits) of a loaded model, plain or with adapters, or of a folder of safetensors.

    Models of up to ``FULL_HASH_LIMIT`` (512 Mi) elements without ``lm_head`` are hashed element by element. Of larger
    ones each tensor of more than 65,536 elements is sampled: 64 runs of 1,024 consecutive elements, evenly spaced, the
    first at its start and the last at its end. A change confined to elements that are not sampled is then not seen:
    this finds another model, another revision or further training, and not a deliberate edit of single elements.
    Changes below bfloat16's resolution are not seen either, and a float16 copy counts as another model where its
    rounding differs. A quantised model is another model.

    Raises InputError for a folder without readable safetensors, and for a model that cannot be read in full (adapter
    merged into the weights, weights on the meta device).
    """
    if isinstance(source, nn.Module):
        return _of_model(source)
    folder = Path(source).expanduser().absolute()
    files = _weight_files(folder)
    return _of_folder(folder, tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def checkpoint_shapes(folder: StrPath) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a safetensors checkpoint by name, from the headers alone; raises InputError."""
    return {name: stored.shape for name, stored in _headers(Path(folder)).items()}


# ---------------------------------------------------------------------------------------------- a folder


@functools.lru_cache(maxsize=32)
def _of_folder(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Many adapters are checked against one folder; ``files`` (name, size, time) makes a changed one a new key."""
    stored = {name: where for name, where in _headers(folder).items() if _counts(name)}
    handles: dict[Path, BinaryIO] = {}
    try:
        for file, _, _ in files:
            handles[file] = file.open("rb", buffering=0)
        weights = [_stored_weight(name, where, handles[where.file]) for name, where in stored.items()]
        return _combine(_digests(weights, full=sum(w.size for w in weights) <= FULL_HASH_LIMIT))
    finally:
        for handle in handles.values():
            handle.close()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / file for file in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not a safetensors index: fetch the base model again.") from error
    else:
        others = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "adapter_model.safetensors"]
        files = [single] if single.is_file() else others
    if not files:
        raise InputError(
            f"{folder} holds no safetensors weights of a base model: give a folder written by save_pretrained."
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{folder} lacks {missing[0]}, which its index names: fetch the base model again.")
    return files


def _headers(folder: Path) -> dict[str, _Stored]:
    tensors: dict[str, _Stored] = {}
    for file in _weight_files(folder):
        tensors.update(_header(file))
    return tensors


def _header(file: Path) -> dict[str, _Stored]:
    """Names, types, shapes and places (8 bytes of length, JSON, data: the safetensors format)."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
        begin = 8 + length
        found = {
            name: _Stored(file, entry["dtype"], tuple(entry["shape"]), *(begin + at for at in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
        if any(stored.stop > size for stored in found.values()):
            raise ValueError("the file ends before its last tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no complete safetensors file ({error}): fetch the base model again.") from error
    return found


def _stored_weight(name: str, stored: _Stored, handle: BinaryIO) -> _Weight:
    dtype = _DTYPES.get(stored.dtype, torch.uint8)  # bytes of integers are compared as they are
    width = dtype.itemsize

    def read(start: int, stop: int) -> Tensor:
        data = os.pread(handle.fileno(), (stop - start) * width, stored.start + start * width)
        return torch.frombuffer(bytearray(data), dtype=dtype)

    return _Weight(name, stored.shape, (stored.stop - stored.start) // width, read)


# ---------------------------------------------------------------------------------------------- a loaded model


def _of_model(model: nn.Module) -> str:
    get_base = getattr(model, "get_base_model", None)
    base: nn.Module = get_base() if callable(get_base) else model
    state = _base_state(base)
    full = sum(_size(tensor) for tensor in state.values()) <= FULL_HASH_LIMIT
    digests: dict[str, bytes] = {}
    # Layer by layer, because undoing a conversion may copy what it touches.
    for _, names in groupby(sorted(state, key=_layer), key=_layer):
        part = _as_in_checkpoint(base, {name: state[name] for name in names})
        digests.update(_digests([_loaded_weight(n, t) for n, t in part.items() if _counts(n)], full))
    return _combine(digests)


def _base_state(base: nn.Module) -> dict[str, Tensor]:
    """State of the base model alone, under the names that it has without adapters.

    PEFT keeps what it wraps as ``base_layer`` (or ``original_module``) beside its own weights.
    """
    wrappers: dict[str, str] = {}
    for name, module in base.named_modules():
        if getattr(module, "merged_adapters", None):
            raise InputError(f"An adapter is merged into {name}: call unmerge_adapter() first, the base has changed.")
        inner = next((kept for kept in ("base_layer", "original_module") if hasattr(module, kept)), None)
        if inner:
            wrappers[name] = inner
    tied = getattr(base, "all_tied_weights_keys", None) or {}
    state = {}
    for name, tensor in base.state_dict().items():
        plain = _without_wrappers(name, wrappers)
        if plain is None or not isinstance(tensor, Tensor) or not _counts(plain):
            continue
        if tensor.device.type == "meta":
            raise InputError(f"Weight {plain} is not in memory: load the model without offloading, or give its folder.")
        state[plain] = tensor.detach()
    return {name: tensor for name, tensor in state.items() if not _repeats(state, name, tied.get(name))}


def _without_wrappers(name: str, wrappers: dict[str, str]) -> str | None:
    """The name before wrapping; None for a weight that a wrapper added."""
    parts: list[str] = []
    path = ""
    keep: str | None = None
    for part in name.split("."):
        path = f"{path}.{part}" if path else part
        if keep is None:
            parts.append(part)
        elif part != keep:
            return None
        keep = wrappers.get(path)
    return ".".join(parts)


def _repeats(state: dict[str, Tensor], name: str, source: str | None) -> bool:
    """Whether the tensor is a tied copy, which ``save_pretrained`` leaves out."""
    return source in state and state[source].data_ptr() == state[name].data_ptr()


def _as_in_checkpoint(base: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not (hasattr(base, "config") and hasattr(base, "save_pretrained")):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    hub_model: Any = base
    return dict(revert_weight_conversion(hub_model, state))


def _layer(name: str) -> str:
    """``model.layers.3`` for all of layer 3, else the name's first part."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match else name.split(".")[0]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * (1 if tensor.is_floating_point() else tensor.element_size())


def _loaded_weight(name: str, tensor: Tensor) -> _Weight:
    flat = tensor.contiguous().view(-1)
    if not flat.is_floating_point():
        flat = flat.view(torch.uint8)
    return _Weight(name, tuple(tensor.shape), flat.numel(), lambda start, stop: flat[start:stop])


# ---------------------------------------------------------------------------------------------- hashing


def _counts(name: str) -> bool:
    return not (_HEADS & set(name.split("."))) and not _IGNORED.search(name)


def _digests(weights: Iterable[_Weight], full: bool) -> dict[str, bytes]:
    """Name to digest. Threads, because hashing, reading and converting all release the interpreter."""
    listed = list(weights)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip((w.name for w in listed), pool.map(lambda w: _digest(w, full), listed), strict=True))


def _digest(weight: _Weight, full: bool) -> bytes:
    state = hashlib.sha256(repr(weight.shape).encode())
    for start, stop in _ranges(weight.size, full):
        values = weight.read(start, stop)
        if values.numel() != stop - start:
            raise InputError(f"Weight {weight.name} ends early: fetch the base model again.")
        if values.is_floating_point():
            values = values.to(torch.bfloat16)
        state.update(values.cpu().view(torch.uint8).numpy().data)
    return state.digest()


def _ranges(size: int, full: bool) -> Iterator[tuple[int, int]]:
    """[start, stop) of the elements to hash, in order."""
    if full or size <= SAMPLE_RUNS * SAMPLE_RUN:
        return ((start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK))
    starts = (run * (size - SAMPLE_RUN) // (SAMPLE_RUNS - 1) for run in range(SAMPLE_RUNS))
    return ((start, start + SAMPLE_RUN) for start in starts)


def _combine(digests: dict[str, bytes]) -> str:
    """One hash of all; the prefix that all names share is dropped, as checkpoints of a bare decoder lack ``model.``"""
    if not digests:
        raise InputError("The base model has no weights: give a model or a folder that holds them.")
    paths = [name.split(".") for name in digests]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    state = hashlib.sha256(_DOMAIN)
    for name, digest in sorted((".".join(path[shared:]), digests[".".join(path)]) for path in paths):
        state.update(name.encode() + b"\0" + digest)
    return state.hexdigest()
