"""The files of an adapter directory: their names, and reading them without PEFT and without running code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from icarus.adapter import stored
from icarus.adapter.stored import Stored
from icarus.errors import AdapterError, first_line

MARKER_VERSION = 1
"""Version of the ``icarus`` object in ``adapter_config.json`` that is written and read."""

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
"""What old versions of PEFT wrote in place of ``adapter_model.safetensors``."""
CARD_NAME = "README.md"

PICKLE_NAMES = (PICKLE_NAME, "adapter_model.pt")
"""What vLLM reads where there is no ``WEIGHTS_NAME``, in this order (vllm/lora/lora_model.py)."""

_MAX_CONFIG_BYTES = 16 * 1024**2  # the longest configs name each target of a large model by its path: some megabytes

StrPath = str | os.PathLike[str]
Config = Mapping[str, Any]  # of ``CONFIG_NAME``


def is_icarus(directory: StrPath) -> bool:
    """Whether the directory's config carries the ICaRus marker; says nothing about its soundness."""
    try:
        return "icarus" in read_config(Path(directory))
    except AdapterError:
        return False


def is_conventional(directory: StrPath) -> bool:
    """Whether the directory has a config, and that no ICaRus marker; says nothing about its soundness."""
    try:
        return "icarus" not in read_config(Path(directory))
    except AdapterError:
        return False


def read_config(directory: Path) -> dict[str, Any]:
    """The config of an adapter directory, as it is.

    Raises:
        AdapterError: it is missing or no JSON object.
    """
    file = directory / CONFIG_NAME
    try:
        if not directory.is_dir():
            raise AdapterError("there is no such directory; give the folder of an adapter, with adapter_config.json")
        if not file.is_file():  # a pipe or a device would be read for ever
            raise AdapterError(f"{CONFIG_NAME} is missing; give the folder of an adapter, or copy it again")
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterError(f"{CONFIG_NAME} is {file.stat().st_size:,} bytes long; copy or save the adapter again")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG_NAME} is not readable JSON ({error}); copy or save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_NAME} is not a JSON object; copy or save the adapter again")
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory, by their names in the file.

    Raises:
        AdapterError: they are missing, damaged, or there as a pickle alone.
    """
    try:
        tensors: dict[str, Tensor] = load_file(_weights_file(directory))
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(error) from None
    return tensors


def _weights_file(directory: Path) -> Path:
    """A regular file: a pipe or a device would be read for ever."""
    if not os.path.isfile(directory / WEIGHTS_NAME):
        if os.path.isfile(directory / PICKLE_NAME):
            raise AdapterError(f"only {PICKLE_NAME} is there, a pickle that could run code; save it as {WEIGHTS_NAME}")
        raise AdapterError(f"{WEIGHTS_NAME} is missing; copy or save the adapter again")
    return directory / WEIGHTS_NAME


def _damaged(error: Exception) -> AdapterError:
    why = first_line(error)
    return AdapterError(f"{WEIGHTS_NAME} is truncated or not a safetensors file ({why}); copy or save it again")


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of an adapter directory, without their values.

    Raises:
        AdapterError: they are missing, damaged, or there as a pickle alone.
    """
    file = _weights_file(directory)
    try:
        return stored.of_file(file)
    except (OSError, ValueError) as error:
        raise _damaged(error) from None


def served_tensors(directory: Path) -> dict[str, Stored]:
    """The same of what vLLM reads of a conventional adapter: pickles as well, without what could run code.

    Raises:
        AdapterError: they are missing or damaged, or a pickle holds more than tensors.
    """
    pickle = next((directory / name for name in PICKLE_NAMES if os.path.isfile(directory / name)), None)
    if pickle is None or os.path.isfile(directory / WEIGHTS_NAME):
        return stored_tensors(directory)
    try:
        tensors: dict[str, Tensor] = torch.load(pickle, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise AdapterError(
            f"{pickle.name} cannot be read safely ({first_line(error)}); save it as {WEIGHTS_NAME}"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise AdapterError(f"{pickle.name} holds something else than tensors by name; save it as {WEIGHTS_NAME}")
    return {str(name): stored.of_tensor(tensor, str(name)) for name, tensor in tensors.items()}
