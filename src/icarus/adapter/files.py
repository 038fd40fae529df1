"""The files of an adapter directory: their names, and reading them without PEFT and without running code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from icarus.errors import AdapterError

MARKER_VERSION = 1
"""Version of the ``icarus`` object in ``adapter_config.json`` that is written and read."""

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
"""What old versions of PEFT wrote in place of ``adapter_model.safetensors``."""
CARD_NAME = "README.md"

StrPath = str | os.PathLike[str]


def is_icarus(directory: StrPath) -> bool:
    """Whether the directory's config carries the ICaRus marker; says nothing about whether the adapter is sound."""
    try:
        return "icarus" in read_config(Path(directory))
    except AdapterError:
        return False


def read_config(directory: Path) -> dict[str, Any]:
    """The config of an adapter directory, as it is.

    Raises:
        AdapterError: it is missing or no JSON object.
    """
    if not directory.is_dir():
        raise AdapterError("there is no such directory; give the folder of an adapter, with adapter_config.json")
    try:
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{CONFIG_NAME} is missing; give the folder of an adapter, or copy it again") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{CONFIG_NAME} is not readable JSON ({error}); copy or save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG_NAME} is not a JSON object; copy or save the adapter again")
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory, by their names in the file.

    Raises:
        AdapterError: they are missing, damaged, or there as a pickle alone.
    """
    if not (directory / WEIGHTS_NAME).is_file():
        if (directory / PICKLE_NAME).is_file():
            raise AdapterError(f"only {PICKLE_NAME} is there, a pickle that could run code; save it as {WEIGHTS_NAME}")
        raise AdapterError(f"{WEIGHTS_NAME} is missing; copy or save the adapter again")
    try:
        tensors: dict[str, Tensor] = load_file(directory / WEIGHTS_NAME)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{WEIGHTS_NAME} is truncated or not a safetensors file ({error}); copy or save it again"
        ) from None
    return tensors
