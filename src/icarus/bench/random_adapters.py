"""Adapters with random weights on disk, for measurements whose speed does not depend on what was learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from icarus import adapter, base_model
from icarus.fingerprint import fingerprint


def write(
    base: str, folder: Path, names: Sequence[str], *, icarus: bool, rank: int, dtype: str, seed: int
) -> dict[str, str]:
    """Writes adapters for ``base``, ICaRus or conventional ones; returns their folders by name.

    A and B are as PEFT starts A: uniform and scaled by width. So B is not zero, and nothing is skipped for being so.
    """
    model, _ = base_model.load(base, dtype=dtype, device="cpu")
    mark = fingerprint(model)
    attached: Any = (adapter.attach if icarus else adapter.attach_conventional)(model, rank=rank)
    written = {}
    for number, name in enumerate(names):
        _randomize(attached, torch.Generator().manual_seed(seed + number))
        target = folder / name
        if icarus:
            adapter.save(attached, target, base_fingerprint=mark, dtype=getattr(torch, dtype))
        else:
            adapter.save_conventional(attached, target, dtype=getattr(torch, dtype))
        written[name] = str(target)
    return written


@torch.no_grad()
def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            reach = weight.shape[1] ** -0.5
            weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * reach)
