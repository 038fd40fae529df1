"""A conventional adapter's weights added to those of its base model, which is then another base model."""

from __future__ import annotations

from typing import Any

from torch import nn

from icarus.adapter.files import StrPath
from icarus.errors import AdapterError


def merge(model: nn.Module, directory: StrPath) -> nn.Module:
    """The model with W + s B A in place of W; the one that was given is used up.

    Merge in float32: what is rounded here is rounded for all specialists on that base model.

    Raises:
        AdapterError: the sum is not finite.
    """
    from peft import PeftModel

    peft: Any = PeftModel.from_pretrained(model, str(directory))
    try:
        merged: nn.Module = peft.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT names no reason but this one
        raise AdapterError(f"{directory} has weights that are not finite; train it again with a lower rate.") from error
    return merged
