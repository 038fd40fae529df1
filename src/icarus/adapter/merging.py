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

    Each sum is taken in float64 and rounded once, to the model's dtype. In float32 its last bit would depend on the
    order in which a processor adds up, and with it the fingerprint of the base model that comes out.

    Raises:
        AdapterError: it was trained on a base model of another name, or the sum is not finite.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    own, its = model.name_or_path, read_config(Path(directory)).get("base_model_name_or_path")
    if own != its:
        raise AdapterError(f"{directory} was trained on {its}, and cannot be merged into {own}; train it on that.")

    peft: Any = PeftModel.from_pretrained(model, str(directory))
    try:
        layers: list[Any] = [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            dtype = layer.get_base_layer().weight.dtype
            layer.double().merge(safe_merge=True)
            layer.to(dtype)
    except ValueError as error:  # PEFT names no reason but this one
        raise AdapterError(f"{directory} has weights that are not finite; train it again with a lower rate.") from error
    merged: nn.Module = peft.unload()
    return merged
