"""The folder of a base model: how it is written, and what its files tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icarus import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, card: str = "") -> None:
    """Write a base model to a folder, which appears when it is complete; ``card`` is its README.md, if any."""
    with atomic.replacing(directory, key="config.json") as whole:
        write(model, tokenizer, whole)
        if card:
            (whole / "README.md").write_text(card, encoding="utf-8")


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write its files into a folder."""
    sampling: Any = model.generation_config
    try:
        sampling.validate(strict=True)
    except ValueError:  # a temperature without do_sample, say: loading warns of it, and saving would refuse it
        sampling.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # safetensors writes files that only their owner can read
        file.chmod((folder / "config.json").stat().st_mode)


def dtype_of(folder: Path) -> str:
    """That in which a base model's weights are stored; float32 where its config does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def parameters(folder: Path) -> int | None:
    """About how many parameters a model folder holds, by the size of its files; None if they do not tell.

    They do not if there are no safetensors, or if they are quantised.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, ValueError):
        return None
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    width = {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype.removeprefix("torch."))
    return None if width is None or not size or "quantization_config" in config else size // width
