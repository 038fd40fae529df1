"""Connects lora_rows.py with vLLM on CPUs, for decoder rows and conventional adapters; ICARUS_CPU_LORA=0 is stock.

vLLM's LoRA layers call their ``punica_wrapper`` with the weights of all resident adapters, and tell it the adapter of
each row when that changes (vllm/lora/punica_wrapper/punica_cpu.py).
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import wraps
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.classifier import ClassificationHeadWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from icarus.vllm.cpu import lora_rows
from icarus.vllm.patching import Original

_scoring_prompt: ContextVar[bool] = ContextVar("icarus_scoring_prompt", default=False)
"""Whether logits are of a prompt's rows, and not of sampled rows."""


class RowsWrapper(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM is untyped to a checker that lacks it
    """A ``PunicaWrapperCPU`` whose operator takes runs of rows, and skips layers that no adapter of the step touches.

    vLLM hands over a layer's tensors with each call; ``lora_rows.cpp`` knows layers by the address of the first, and
    runs by what it was told with them, so that a graph that is compiled once asks in every step for what its rows need.
    """

    def __init__(self, max_num_batched_tokens: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, *args, **kwargs)
        lora_rows.load()
        self._runs = lora_rows.no_runs(max_num_batched_tokens)  # of the rows of a step
        self._sampled = lora_rows.no_runs(max_num_batched_tokens)  # of the rows that are sampled
        self._known: dict[int, Tensor] = {}
        finalize(self, _forget, self._known)

    def adopt(self, modules: dict[str, Any], slot: int) -> None:
        """The weights in a slot are new."""
        for module in modules.values():
            if module.punica_wrapper is not self:
                continue
            if isinstance(module, ClassificationHeadWithLoRA):  # a linear layer, of the sampled rows
                self._look(module.lora_a_stacked, module.lora_b_stacked, self._sampled, slot)
            elif isinstance(module, BaseLinearLayerWithLoRA):
                self._look(module.lora_a_stacked, module.lora_b_stacked, self._runs, slot)
            elif isinstance(module, LogitsProcessorWithLoRA):
                self._look((module.lora_a_stacked,), (module.lora_b_stacked,), self._sampled, slot)
            elif isinstance(module, VocabParallelEmbeddingWithLoRA):
                self._look((), (module.lora_b_stacked,), self._runs, slot)

    def _look(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...], runs: Tensor, slot: int) -> None:
        first = (a or b)[0]
        self._known[first.data_ptr()] = first
        torch.ops.icarus.look(a, b, runs, slot)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Find the runs; vLLM calls this when rows or slots have changed."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slot_of = {name: slot for slot, name in enumerate(lora_index_to_id) if name is not None}
        for ids, runs in ((mapping.index_mapping, self._runs), (mapping.prompt_mapping, self._sampled)):
            lora_rows.find_runs([slot_of[name] if name > 0 else -1 for name in ids], runs)

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> None:
        """``y`` (rows, outputs) += what each row's adapter makes of ``x`` (rows, inputs)."""
        torch.ops.icarus.add_lora(y, x, lora_a_stacked[0])

    def add_lora_logits(self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        """The same for ``lm_head``.

        Logits of a prompt (prompt_logprobs) come for one request at a time, and nothing tells which: an adapter of
        ``lm_head`` is left out of them. On GPUs such logprobs are not right either (vllm issue 51594). Stock operators
        stop the engine there.
        """
        if not _scoring_prompt.get():
            torch.ops.icarus.add_lora(y, x, lora_a_stacked)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        """The same for embeddings; ``x`` (rows, r) is what A makes of the tokens."""
        torch.ops.icarus.add_lora(y, x, lora_b_stacked)


def _forget(known: dict[int, Tensor]) -> None:
    for first in known.values():
        torch.ops.icarus.forget(first)


def _usable(lora_config: Any) -> bool:
    """A and B of fully sharded layers have different ranks."""
    return lora_rows.wanted() and lora_rows.available() and not lora_config.fully_sharded_loras


def wrap_get_punica_wrapper(original: Original) -> Original:
    """``get_punica_wrapper``: ours on CPUs, where it can be used."""

    @wraps(original)
    def get_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
        if current_platform.is_cpu() and _usable(kwargs["lora_config"]):
            return RowsWrapper(*args, **kwargs)
        return original(*args, **kwargs)

    return get_punica_wrapper


def wrap_get_prompt_logprobs_dict(original: Original) -> Original:
    """``_get_prompt_logprobs_dict``: the logits that it asks for are not those of sampled rows."""

    @wraps(original)
    def _get_prompt_logprobs_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _scoring_prompt.set(True)
        try:
            return original(self, *args, **kwargs)
        finally:
            _scoring_prompt.reset(token)

    return _get_prompt_logprobs_dict


def wrap_activate_adapter(original: Original) -> Original:
    """``LoRAModelManager.activate_adapter``: the only place where an adapter's weights enter its slot."""

    @wraps(original)
    def activate_adapter(self: Any, lora_id: int) -> Any:
        changed = original(self, lora_id)
        if changed:
            for wrapper in self.punica_wrapper_mapping.values():
                if isinstance(wrapper, RowsWrapper):
                    wrapper.adopt(self.modules, self.lora_index_to_id.index(lora_id))
        return changed

    return activate_adapter


def wrap_check_and_update_config(original: Original) -> Original:
    """``CpuPlatform.check_and_update_config``: LoRA does not turn torch.compile off.

    vLLM's operators look into the step's rows, which a graph that is traced once would keep; ours are opaque to it.
    MoE and fully sharded layers call others, so with them it stays off.
    """

    @wraps(original)
    def check_and_update_config(vllm_config: Any) -> Any:
        lora, model = vllm_config.lora_config, vllm_config.model_config
        if lora is None or model is None or model.is_moe or not _usable(lora):
            return original(vllm_config)
        vllm_config.lora_config = None
        try:
            return original(vllm_config)
        finally:
            vllm_config.lora_config = lora

    return check_and_update_config
