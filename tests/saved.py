"""A tiny base model and tiny adapters on disk, as a user would have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers.utils import logging

from icarus import adapter
from tiny_models import tiny, tiny_tokenizer

# Progress bars are for a terminal. ``icarus`` has none elsewhere; within pytest they would be in what it prints.
datasets.disable_progress_bars()
logging.disable_progress_bar()


def save_base(folder: Path, template: str | None = None, **options: Any) -> Path:
    tiny(**options).save_pretrained(folder)
    tokenizer = tiny_tokenizer() if template is None else tiny_tokenizer(template)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, seed: int = 1) -> Path:
    """An ICaRus adapter of the default tiny model whose weights do something."""
    model = adapter.attach(tiny(), rank=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return adapter.save(model, folder)


def save_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
