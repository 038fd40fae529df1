"""Which rows of a pass the LoRA layers of a PEFT model act on: all, none, or the second half of the batch.

Works on what PEFT puts on its layers (``base_layer``, ``lora_A``, ``lora_B``, ``scaling``) and needs no PEFT. To find
the layers takes longer than to run a small one, so it is done once for each set of attached adapters; PEFT's own
``disable_adapter`` inspects the whole model at every call, which for a small model costs more than the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from icarus.adapter import feeds_kv
from icarus.errors import InputError, UnsupportedModelError

Forward = Callable[..., Tensor]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and the like, which keep it under ``module``."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


class LoraLayers:
    """The LoRA layers of a model, with or without any.

    Raises:
        UnsupportedModelError: on use, for adapters that two streams cannot have: on a projection that feeds K or V,
            on embeddings, of another kind than plain LoRA, or merged into the base weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._attached: list[Any] = []
        self._layers: list[Any] = []
        self._forwards: dict[str | None, list[Forward]] = {}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Base weights alone inside the block: W x."""
        with self._replaced(None):
            yield

    @contextmanager
    def on_second_half(self, adapter: str) -> Iterator[None]:
        """Inside the block W x, and + s B A x on the second half of the batch."""
        self.check_attached(adapter)
        with self._replaced(adapter):
            yield

    def activate(self, adapter: str) -> None:
        """Make PEFT's own forward run this adapter and no other."""
        self.check_attached(adapter)
        self._refresh()
        peft: Any = unwrapped(self.model)
        if list(peft.active_adapters) != [adapter]:
            peft.set_adapter(adapter)

    def check_attached(self, adapter: str) -> None:
        """Check that the model has an adapter of that name.

        Raises:
            InputError: it has none.
        """
        if adapter not in getattr(unwrapped(self.model), "peft_config", ()):
            raise InputError(f"No adapter named {adapter!r} is attached to the model; load it first.")

    @contextmanager
    def _replaced(self, adapter: str | None) -> Iterator[None]:
        self._refresh()
        if adapter not in self._forwards:
            self._forwards[adapter] = [_forward(layer, adapter) for layer in self._layers]
        # Straight into the attributes: nn.Module's own setattr costs more than all else here.
        outer = [vars(layer).get("forward") for layer in self._layers]  # a block may stand inside another
        self._put(self._forwards[adapter])
        try:
            yield
        finally:
            self._put(outer)

    def _put(self, forwards: Sequence[Forward | None]) -> None:
        for layer, forward in zip(self._layers, forwards, strict=True):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward

    def _refresh(self) -> None:
        configs = list(getattr(unwrapped(self.model), "peft_config", {}).values())
        same = len(configs) == len(self._attached)
        if not (same and all(a is b for a, b in zip(configs, self._attached, strict=True))):
            # PEFT makes a new config for whatever it attaches, so this is another set of layers.
            named = [(name, layer) for name, layer in self.model.named_modules() if hasattr(layer, "lora_A")]
            for name, layer in named:
                _refuse(name, layer)
            self._layers, self._forwards, self._attached = [layer for _, layer in named], {}, configs
            if not self.model.training:  # PEFT makes new layers in training mode, dropout and all
                for layer in self._layers:
                    layer.eval()
        if any(layer.merged_adapters for layer in self._layers):
            raise UnsupportedModelError("An adapter is merged into the base weights; call unmerge_adapter() first.")


def _forward(layer: Any, adapter: str | None) -> Forward:
    base = layer.base_layer
    if adapter is None or adapter not in layer.lora_A:  # it may carry other adapters, one of them active
        return lambda *args, **kwargs: base(*args, **kwargs)
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        half = len(x) // 2
        y[half:] += (up(down(x[half:].to(down.weight.dtype))) * layer.scaling[adapter]).to(y.dtype)
        return y

    return forward


def _refuse(name: str, layer: Any) -> None:
    why = None
    if len(layer.lora_A) and feeds_kv(name):
        why = "it feeds K or V, so the cache would depend on the adapter"
    elif len(layer.lora_embedding_A):
        why = "both streams start from the same embeddings"
    elif layer.lora_variant:
        why = "it is not plain LoRA (but DoRA or the like)"
    if why:
        raise UnsupportedModelError(f"The adapter on {name} cannot run in two streams: {why}; detach it.")
