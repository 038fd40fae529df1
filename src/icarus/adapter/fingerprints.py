"""The identity of a base model: one hash of all its weights.

It says on which base model an adapter was trained. Specialists may share a cache only if all were trained on the
weights that write it, and each is right only with the weights that it was trained on, ``lm_head`` among them.
Fingerprints are

* equal for float32 and bfloat16 copies (values are rounded to bfloat16 first), for one file, shards, or a loaded model
  (with or without adapters), on any device, in any order of tensors, with a tied ``lm_head`` stored or not;
* different when any base weight differs by more than that rounding: up to ``FULL_HASH_LIMIT`` elements every element is
  read; above it, ``fingerprint`` says what is not.

For folders no modelling code is needed (the vLLM plugin uses them). For a loaded model, Transformers undoes what it
converted on loading (for example experts merged into one tensor), so that names and shapes are the checkpoint's, as
``save_pretrained`` would write them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icarus.adapter import stored
from icarus.adapter.files import StrPath
from icarus.adapter.stored import Ranges, Stored
from icarus.errors import InputError

FULL_HASH_LIMIT = 512 * 1024**2
"""Elements; larger models are sampled."""

SAMPLE_RUNS, SAMPLE_RUN = 64, 1024
"""Sample of a tensor: evenly spaced runs of consecutive elements, 65,536 in all. Runs and not single elements, because
those would touch every page of the file and so read all of it."""

_DOMAIN = b"icarus-base-1"
_HEADS = {"lm_head", "embed_out"}
# Buffers that old checkpoints store and Transformers ignores on loading.
_IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
# In the names of a model with PEFT's LoRA: what wraps base weights, and what is beside them.
_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")
_ADDED = re.compile(r"\.(lora_\w+|modules_to_save)\.")


def fingerprint(source: nn.Module | StrPath) -> str:
    """Hex fingerprint (64 digits) of a loaded model, plain or with adapters, or of a folder of safetensors.

    Models of up to ``FULL_HASH_LIMIT`` (512 Mi) elements without ``lm_head`` are hashed element by element. Of larger
    ones each tensor of more than 65,536 elements is sampled: 64 runs of 1,024 consecutive elements, evenly spaced, the
    first at its start and the last at its end. A change confined to elements that are not sampled is then not seen:
    another model, another revision or further training is told apart, a deliberate edit of single elements is not.
    Changes below bfloat16's resolution are not seen either, and a float16 copy counts as another model where its
    rounding differs. A quantised model is another model.

    Raises:
        InputError: a folder without readable safetensors, or a model that cannot be read in full (an adapter is merged
            into the weights, weights are on the meta device).
    """
    if isinstance(source, nn.Module):
        return _of_model(base_of(source))
    files = _weight_files(Path(source).expanduser().absolute())
    return _of_files(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def checkpoint_shapes(folder: StrPath) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a safetensors checkpoint by name, from the headers alone.

    Raises:
        InputError: the checkpoint is missing or damaged.
    """
    return {name: weight.shape for name, weight in _stored(_weight_files(Path(folder))).items()}


def base_of(model: nn.Module) -> nn.Module:
    """The model under PEFT's adapters; the model itself where it has none."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


# ---------------------------------------------------------------------------------------------- a folder


@functools.lru_cache(maxsize=32)
def _of_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Cached, because many adapters are checked against one folder; a changed file has another size or time."""
    weights = {name: weight for name, weight in _stored([file for file, _, _ in files]).items() if _counts(name)}
    return _combine(_digests(weights, _in_full(weights)))


def _weight_files(folder: Path) -> list[Path]:
    """The files that ``save_pretrained`` writes: one, or the shards that an index names."""
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [folder / file for file in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not a safetensors index; fetch the base model again.") from error
    elif not files[0].is_file():
        raise InputError(
            f"{folder} holds no safetensors weights of a base model; give a folder written by save_pretrained."
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{folder} lacks {missing[0]}, which its index names; fetch the base model again.")
    return files


def _stored(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of files, by their headers."""
    weights: dict[str, Stored] = {}
    for file in files:
        try:
            weights |= stored.of_file(file)
        except ValueError as error:
            raise InputError(
                f"{file} is not a complete safetensors file ({error}); fetch the base model again."
            ) from error
    return weights


# ---------------------------------------------------------------------------------------------- a loaded model


def _of_model(base: nn.Module) -> str:
    state = _base_state(base)
    full = _in_full({name: stored.of_tensor(tensor) for name, tensor in state.items()})
    digests: dict[str, bytes] = {}
    # Layer by layer, because undoing a conversion may copy what it touches.
    for _, names in groupby(sorted(state, key=_layer), key=_layer):
        part = _as_in_checkpoint(base, {name: state[name] for name in names})
        digests |= _digests({name: stored.of_tensor(tensor) for name, tensor in part.items() if _counts(name)}, full)
    return _combine(digests)


def _base_state(base: nn.Module) -> dict[str, Tensor]:
    """State of the base model alone, under its names without adapters, and without tied copies."""
    if merged := [name for name, module in base.named_modules() if getattr(module, "merged_adapters", None)]:
        raise InputError(f"An adapter is merged into {merged[0]}; call unmerge_adapter() first, the base has changed.")
    state: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        plain = _WRAPPED.sub("", name)
        if _ADDED.search(name) or not isinstance(tensor, Tensor) or not _counts(plain):
            continue
        if tensor.device.type == "meta":
            raise InputError(f"Weight {plain} is not in memory; load the model without offloading, or give its folder.")
        state[plain] = tensor.detach()
    for copy, source in (getattr(base, "all_tied_weights_keys", None) or {}).items():
        if {copy, source} <= state.keys() and state[copy].data_ptr() == state[source].data_ptr():
            del state[copy]  # save_pretrained leaves it out as well
    return state


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


# ---------------------------------------------------------------------------------------------- hashing


def _counts(name: str) -> bool:
    return not _IGNORED.search(name)


def _of_head(name: str) -> bool:
    return not _HEADS.isdisjoint(name.split("."))


def _in_full(weights: dict[str, Stored]) -> bool:
    """Whether every element is hashed. The head does not count, as a tied one may be stored or not."""
    return sum(weight.size for name, weight in weights.items() if not _of_head(name)) <= FULL_HASH_LIMIT


def _digests(weights: dict[str, Stored], full: bool) -> dict[str, bytes]:
    """In threads, because hashing, reading and converting all release the interpreter's lock."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(weights, pool.map(lambda weight: _digest(weight, full), weights.values()), strict=True))


def _digest(weight: Stored, full: bool) -> bytes:
    state = hashlib.sha256(repr(weight.shape).encode())
    for values in weight.read(_ranges(weight.size, full)):
        rounded = values.to(torch.bfloat16) if values.is_floating_point() else values
        state.update(rounded.cpu().view(torch.uint8).numpy().data)
    return state.digest()


def _ranges(size: int, full: bool) -> Ranges:
    """What is hashed of a tensor of this size."""
    if full or size <= SAMPLE_RUNS * SAMPLE_RUN:
        return stored.pieces(size)
    starts = (run * (size - SAMPLE_RUN) // (SAMPLE_RUNS - 1) for run in range(SAMPLE_RUNS))
    return ((start, start + SAMPLE_RUN) for start in starts)


def _combine(digests: dict[str, bytes]) -> str:
    """One hash of all weights but a head that equals another weight, which is tied to the input embedding.

    The prefix that all other names share is dropped, as checkpoints of a bare decoder lack ``model.``.
    """
    paths = [name.split(".") for name in digests if not _of_head(name)]
    if not paths:
        raise InputError("The base model has no weights; give a model or a folder that holds them.")
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    named = [(".".join(path[shared:]), digests[".".join(path)]) for path in paths]
    decoder = {digest for _, digest in named}
    named += [(name, digest) for name, digest in digests.items() if _of_head(name) and digest not in decoder]
    state = hashlib.sha256(_DOMAIN)
    for name, digest in sorted(named):
        state.update(name.encode() + b"\0" + digest)
    return state.hexdigest()
