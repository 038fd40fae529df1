"""Whether vLLM makes use of all that an adapter has.

What it has read lies under the names that its model has for modules, by mappings that only it knows (a language model
within a multimodal one, fused projections). Weights that no module asks for are left out without a word, among them
those that ``--lora-target-modules`` excludes; and a product of scale and weights may leave the range of ``--dtype``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from icarus.errors import AdapterError


def check_placed(manager: Any, lora: Any, name: str) -> None:
    """Compare a ``LoRAModel`` that was read with the ``LoRAModelManager`` that will apply it.

    Raises:
        AdapterError: a module is unknown or of another width, or values do not fit the type that they are served in.
    """
    for module, weights in lora.loras.items():
        if overflow := _overflow(weights):
            raise AdapterError(
                f"Adapter {name!r} has {module}, which is not finite in {overflow} times its scale; serve with --dtype "
                "float32, or retrain."
            )
        if not _all_modules_are_here(manager):
            continue
        place = next(_places(manager, module), None)
        if place is None:
            raise AdapterError(
                f"Adapter {name!r} has weights for {module}, which vLLM would leave out; leave out "
                "--lora-target-modules, or retrain without it."
            )
        width = getattr(getattr(place, "base_layer", None), "input_size", None)
        if width is not None and isinstance(weights.lora_a, Tensor) and weights.lora_a.shape[-1] != width:
            raise AdapterError(
                f"Adapter {name!r} has {module} with {weights.lora_a.shape[-1]} inputs and the base model has {width}; "
                "use the one it was trained on."
            )


def _overflow(weights: Any) -> torch.dtype | None:
    """The type in which half of a pair is not finite."""
    halves = [half for half in (weights.lora_a, weights.lora_b) if isinstance(half, Tensor)]
    if len(halves) < 2:
        return None
    a, b = halves
    sound = torch.isfinite(a).all() and torch.isfinite(b * weights.scaling).all()
    return None if sound else b.dtype


def _all_modules_are_here(manager: Any) -> bool:
    """Not on ranks that have some layers or experts, and not where a classifier's modules have other names."""
    from vllm.distributed import get_pp_group

    return get_pp_group().world_size == 1 and not manager._use_ep and not manager.is_pooling_model


def _places(manager: Any, module: str) -> Iterator[Any]:
    """The layers that ask for weights of this name."""
    names = [module, module.removesuffix(".base_layer")]  # of experts that PEFT keeps in one
    names += [packed for packed, parts in manager.packed_modules.items() if module in parts]
    yield from (manager.modules[name] for name in names if name in manager.modules)
