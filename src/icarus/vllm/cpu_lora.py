"""Connects products.py with vLLM on CPUs, for decoder rows and conventional adapters alike; ICARUS_CPU_LORA=0 is stock.

vLLM's LoRA layers call their ``punica_wrapper`` with the weights of all resident adapters, and tell it the adapter of
each row when that changes (vllm/lora/punica_wrapper/punica_cpu.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from icarus.vllm.products import Layer, Part, parts, wanted

Stock = Callable[..., Any]


class ProductsWrapper(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM is untyped to a checker that lacks it
    """A ``PunicaWrapperCPU`` that multiplies runs of rows, and skips layers that no adapter of the step touches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By the address of a layer's first tensor, which is all that vLLM hands over.
        self._layers: dict[int, Layer] = {}
        self._embedded: dict[int, set[int]] = {}  # slots whose adapters embed tokens
        self._parts: list[Part] = []  # of the rows of the step
        self._sampled: list[Part] = []  # of the rows that are sampled

    def adopt(self, modules: dict[str, Any], slot: int) -> None:
        """The weights in a slot are new."""
        for module in modules.values():
            if module.punica_wrapper is not self:
                continue
            if isinstance(module, BaseLinearLayerWithLoRA):
                self._refresh(module.lora_a_stacked, module.lora_b_stacked, slot)
            elif isinstance(module, LogitsProcessorWithLoRA):
                self._refresh((module.lora_a_stacked,), (module.lora_b_stacked,), slot)
            elif isinstance(module, VocabParallelEmbeddingWithLoRA):
                slots = self._embedded.setdefault(module.lora_b_stacked.data_ptr(), set())
                _owners[module.lora_b_stacked.data_ptr()] = self
                (slots.add if module.lora_b_stacked[slot].any() else slots.discard)(slot)

    def _refresh(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...], slot: int) -> None:
        if layer := self._layers.get(a[0].data_ptr()):
            layer.refresh(slot)
        else:
            self._layers[a[0].data_ptr()] = Layer(a, b)
            _owners[a[0].data_ptr()] = self

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Part the rows; vLLM calls this when rows or slots have changed."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slot_of: dict[int, int] = {name: slot for slot, name in enumerate(lora_index_to_id) if name is not None}

        def part(ids: tuple[int, ...]) -> list[Part]:
            return parts([slot_of[name] if name > 0 else -1 for name in ids])

        self._parts, self._sampled = part(mapping.index_mapping), part(mapping.prompt_mapping)
        (_busy.add if self._parts else _busy.discard)(id(self))

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> None:
        """``y`` (rows, outputs) += what each row's adapter makes of ``x`` (rows, inputs)."""
        if torch.compiler.is_compiling():
            torch.ops.icarus.add_lora_linear(y, x, lora_a_stacked[0])
        else:
            self.linear(y, x, lora_a_stacked[0])

    def linear(self, y: Tensor, x: Tensor, first: Tensor) -> None:
        """The same; ``first`` of its tensors tells the layer."""
        if self._parts:
            self._layers[first.data_ptr()].add(y, x, self._parts)

    def add_lora_logits(self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        """The same for ``lm_head``.

        Logits of a prompt (prompt_logprobs) come for one request at a time, and nothing tells which: an adapter of
        ``lm_head`` (conventional ones only) is left out of them, unless there happen to be as many rows as are sampled;
        on GPUs such logprobs are not right either (vllm issue 51594). Stock operators stop the engine there.
        """
        rows = self.sampler_indices.numel()
        if self._sampled and len(x) == rows:
            self._layers[lora_a_stacked.data_ptr()].add(y, x, self._sampled)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        """The same for embeddings; ``x`` (rows, r) is what A makes of the tokens."""
        if torch.compiler.is_compiling():
            torch.ops.icarus.add_lora_embedding(y, x, lora_b_stacked)
        else:
            self.embedding(y, x, lora_b_stacked)

    def embedding(self, y: Tensor, x: Tensor, b: Tensor) -> None:
        """Only rows whose adapter has an embedding are touched."""
        slots = self._embedded.get(b.data_ptr(), set())
        for part in self._parts:
            for slot in part.used & slots:
                rows = part.of(slot)
                y[rows] += x[rows] @ b[slot, 0].t()


_owners: WeakValueDictionary[int, ProductsWrapper] = WeakValueDictionary()
"""By the same addresses: what is compiled once asks here, in every step, for what the step's rows need."""

_busy: set[int] = set()
"""Ids of wrappers whose step has rows with adapters: a step of the base model pays for no more than a look at this."""

_library = torch.library.Library("icarus", "FRAGMENT")  # type: ignore[no-untyped-call]


def _add_lora_linear(y: Tensor, x: Tensor, first: Tensor) -> None:
    if _busy and (owner := _owners.get(first.data_ptr())):
        owner.linear(y, x, first)


def _add_lora_embedding(y: Tensor, x: Tensor, b: Tensor) -> None:
    if _busy and (owner := _owners.get(b.data_ptr())):
        owner.embedding(y, x, b)


def _nothing(y: Tensor, x: Tensor, weights: Tensor) -> None:
    """What torch.compile has to know of these operators: they give nothing."""


for _operator in (_add_lora_linear, _add_lora_embedding):
    direct_register_custom_op(
        _operator.__name__[1:],
        _operator,
        mutates_args=["y"],
        fake_impl=_nothing,
        target_lib=_library,
        dispatch_key="CPU",
    )


def choosing(stock: Stock) -> Stock:
    """``get_punica_wrapper``: ours on CPUs, but not for fully sharded layers, whose A and B have different ranks."""

    @wraps(stock)
    def get_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
        if current_platform.is_cpu() and wanted() and not kwargs["lora_config"].fully_sharded_loras:
            return ProductsWrapper(*args, **kwargs)
        return stock(*args, **kwargs)

    return get_punica_wrapper


def adopting(stock: Stock) -> Stock:
    """``LoRAModelManager.activate_adapter``: the only place where an adapter's weights enter its slot."""

    @wraps(stock)
    def activate_adapter(self: Any, lora_id: int) -> Any:
        changed = stock(self, lora_id)
        if changed:
            for wrapper in self.punica_wrapper_mapping.values():
                if isinstance(wrapper, ProductsWrapper):
                    wrapper.adopt(self.modules, self.lora_index_to_id.index(lora_id))
        return changed

    return activate_adapter


def compiling(stock: Stock) -> Stock:
    """``CpuPlatform.check_and_update_config``: LoRA does not turn torch.compile off.

    vLLM's operators look into the step's rows, which a graph that is traced once would keep; ours are opaque to it.
    MoE and fully sharded layers call others, so with them it stays off.
    """

    @wraps(stock)
    def check_and_update_config(vllm_config: Any) -> Any:
        lora, model = vllm_config.lora_config, vllm_config.model_config
        if lora is None or not wanted() or lora.fully_sharded_loras or model is None or model.is_moe:
            return stock(vllm_config)
        vllm_config.lora_config = None
        try:
            return stock(vllm_config)
        finally:
            vllm_config.lora_config = lora

    return check_and_update_config
