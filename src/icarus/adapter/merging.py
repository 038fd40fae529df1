"""A conventional adapter's weights added to those of its base model, which is then another base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from icarus.adapter.files import StrPath, read_config
from icarus.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(model: PreTrainedModel, directory: StrPath) -> nn.Module:
    """The model with W + s B A in place of W; the one that was given is used up.

    Merge in float32: what is rounded here is rounded for all specialists on that base model.

    Raises:
        AdapterError: it was trained on a base model of another name, or the sum is not finite.
    """
    from peft import PeftModel

    own, its = model.name_or_path, read_config(Path(directory)).get("base_model_name_or_path")
    if own != its:
        raise AdapterError(f"{directory} was trained on {its}, and cannot be merged into {own}; train it on that.")

    peft: Any = PeftModel.from_pretrained(model, str(directory))
    try:
        merged: nn.Module = peft.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT names no reason but this one
        raise AdapterError(f"{directory} has weights that are not finite; train it again with a lower rate.") from error
    return merged
