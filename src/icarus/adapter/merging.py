"""A conventional adapter's weights added to those of its base model, which is then another base model."""

from __future__ import annotations

from typing import Any

from torch import nn

from icarus.adapter.files import StrPath


def merge(model: nn.Module, directory: StrPath) -> nn.Module:
    """The model with W + s B A in place of W; the one that was given is used up.

    Merge in float32: what is rounded here is rounded for all specialists on that base model.
    """
    from peft import PeftModel

    peft: Any = PeftModel.from_pretrained(model, str(directory))
    merged: nn.Module = peft.merge_and_unload()
    return merged
