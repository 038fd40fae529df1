"""Base models by their shapes, and adapters for them, without loading any weights.

An adapter is made on the meta device from the model's configuration; only the fingerprint, which ties an ICaRus adapter
to its base model, reads the base's weights. For ``--load-format dummy`` there may be none: a folder with only a
configuration gets a stand-in checkpoint of zeros, a sparse file that takes no room on disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from icarus import adapter
from icarus.errors import InputError

INITIAL_STD = 0.01
"""Of the second halves (B) of the adapters, which LoRA starts at zero: nothing may be skipped for being zero."""


def text_config(base: Path) -> Any:
    """Transformers' configuration of the language model, read from the base model's config.json.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(base).get_text_config()
    except (OSError, ValueError) as error:
        raise InputError(f"{base} has no readable config.json ({error}); give --base the folder of a model.") from error


def kv_bytes_per_token(base: Path, dtype: str) -> int:
    """Bytes of K and V of one token in all layers."""
    config = text_config(base)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    return int(2 * config.num_hidden_layers * kv_heads * size * getattr(torch, dtype).itemsize)


def adapter_name(number: int) -> str:
    """What the adapters are called, from 0 on; served models have these names too."""
    return f"agent-{number}"


def make_adapters(base: Path, folder: Path, kinds: Iterable[str], count: int, rank: int, seed: int) -> None:
    """``count`` adapters of each kind ('icarus', 'conventional') as ``folder/KIND/agent-K``, with random weights.

    Conventional ones target all linear projections, ICaRus ones all but those that feed K and V.
    """
    save_icarus = partial(adapter.save, base_fingerprint=adapter.fingerprint(base))
    ways: dict[str, tuple[Any, Any]] = {
        "icarus": (adapter.attach, save_icarus),
        "conventional": (adapter.attach_conventional, adapter.save_conventional),
    }
    for kind in kinds:
        attach, save = ways[kind]
        model = attach(skeleton(base), rank=rank)
        for number in range(count):
            generator = torch.Generator().manual_seed(seed + number)
            state = {
                name: torch.randn(tensor.shape, generator=generator)
                * (tensor.shape[-1] ** -0.5 if ".lora_A." in name else INITIAL_STD)
                for name, tensor in model.state_dict().items()
                if ".lora_" in name
            }
            save(model, folder / kind / adapter_name(number), dtype=torch.bfloat16, state_dict=state)


def skeleton(base: Path) -> Any:
    """The model's modules without memory for its weights."""
    models: Any = AutoModelForCausalLM  # untyped
    with torch.device("meta"):
        return models.from_config(AutoConfig.from_pretrained(base))


def has_weights(base: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return any((base / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def stand_in(base: Path, folder: Path) -> Path:
    """A copy of a folder without weights, with a sparse checkpoint of bfloat16 zeros of the right shapes.

    Only for ``--load-format dummy``, where vLLM makes up the weights itself and the file is read for its fingerprint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.is_file():
            shutil.copy2(file, folder / file.name)
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in skeleton(base).state_dict().items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + offset)
    return folder
