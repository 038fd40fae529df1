"""On CPUs, vLLM's LoRA layers call our operator (lora_rows.py), for decoder rows and for conventional adapters.

The layers call their ``punica_wrapper`` with the weights of all resident adapters, and vLLM tells it the adapter of
each row when that changes (vllm/lora/punica_wrapper/punica_cpu.py). ``ICARUS_CPU_LORA=0`` restores vLLM's operators.

Each ``wrap_`` function takes a function of vLLM and returns its replacement; see ledger.py.
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

from icarus.errors import InputError
from icarus.vllm.cpu import lora_rows
from icarus.vllm.patching import Original
from icarus.vllm.state import Attached

_scoring_prompt: ContextVar[bool] = ContextVar("icarus_scoring_prompt", default=False)
"""Whether logits are of a prompt's rows, and not of sampled rows."""

_COMPILED = Attached[bool]("compiled")
"""On a ``LoRAConfig``, which workers get: torch.compile has stayed on for our operator."""


class RowsWrapper(PunicaWrapperCPU):  # type: ignore[misc]  # mypy is told not to follow vLLM
    """A ``PunicaWrapperCPU`` whose operator takes runs of rows, and skips layers that no adapter of the step has.

    vLLM passes a layer's tensors with each call. ``lora_rows.cpp`` identifies a layer by the address of the first, and
    knows which runs belong to it. So a graph that is compiled once uses the runs of each step.
    """

    def __init__(self, max_num_batched_tokens: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, *args, **kwargs)
        lora_rows.load()
        self._runs = lora_rows.no_runs(max_num_batched_tokens)  # of the rows of a step
        self._sampled = lora_rows.no_runs(max_num_batched_tokens)  # of the rows that are sampled
        self._known: dict[int, Tensor] = {}
        finalize(self, _forget, self._known)

    def update_slot(self, modules: dict[str, Any], slot: int) -> None:
        """Tell the operator that the weights in a slot are new.

        Args:
            modules: LoRA layers by name; those of other wrappers are skipped.
            slot: that an adapter was written to.
        """
        for module in modules.values():
            if module.punica_wrapper is not self:
                continue
            if isinstance(module, ClassificationHeadWithLoRA):  # a linear layer, of the sampled rows
                self._set_weights(module.lora_a_stacked, module.lora_b_stacked, self._sampled, slot)
            elif isinstance(module, BaseLinearLayerWithLoRA):
                self._set_weights(module.lora_a_stacked, module.lora_b_stacked, self._runs, slot)
            elif isinstance(module, LogitsProcessorWithLoRA):
                self._set_weights((module.lora_a_stacked,), (module.lora_b_stacked,), self._sampled, slot)
            elif isinstance(module, VocabParallelEmbeddingWithLoRA):
                self._set_weights((), (module.lora_b_stacked,), self._runs, slot)

    def _set_weights(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...], runs: Tensor, slot: int) -> None:
        first = (a or b)[0]
        self._known[first.data_ptr()] = first
        torch.ops.icarus.set_weights(a, b, runs, slot)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Find the runs. vLLM calls this when rows or slots have changed."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
        for ids, runs in ((mapping.index_mapping, self._runs), (mapping.prompt_mapping, self._sampled)):
            lora_rows.find_runs([slot_of[lora_id] if lora_id > 0 else -1 for lora_id in ids], runs)

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> None:
        """``y`` (rows, outputs) += ``x`` (rows, inputs) through each row's adapter."""
        torch.ops.icarus.add_lora(y, x, lora_a_stacked[0])

    def add_lora_logits(self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        """The same for ``lm_head``.

        Logits of a scored prompt (``prompt_logprobs``) come one request at a time, and nothing says of which. They
        leave an adapter of ``lm_head`` out. vLLM's operators for GPUs use a wrong one there (vLLM issue 51594), and
        those for CPUs stop the engine.
        """
        if not _scoring_prompt.get():
            torch.ops.icarus.add_lora(y, x, lora_a_stacked)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        """The same for embeddings; to ``x`` (rows, r), A is applied already."""
        torch.ops.icarus.add_lora(y, x, lora_b_stacked)


def _forget(known: dict[int, Tensor]) -> None:
    for first in known.values():
        torch.ops.icarus.forget(first)


def _usable(lora_config: Any) -> bool:
    """Whether our operator can be used: not for fully sharded layers, whose A and B have different ranks."""
    return lora_rows.wanted() and lora_rows.available() and not lora_config.fully_sharded_loras


def wrap_get_punica_wrapper(original: Original) -> Original:
    """``get_punica_wrapper``: on CPUs, the wrapper of our operator, if that can be used.

    A worker decides by its own environment, and the process that configured the engine has decided by another one.

    Raises:
        InputError: that process has left torch.compile on, and the operator cannot be used in this one.
    """

    @wraps(original)
    def get_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
        if current_platform.is_cpu():
            if _usable(kwargs["lora_config"]):
                return RowsWrapper(*args, **kwargs)
            if _COMPILED.get(kwargs["lora_config"]):
                raise InputError(
                    "This worker cannot use ICaRus's LoRA operator, and the engine was configured with it; install "
                    f"g++ and set {lora_rows.SWITCH_VARIABLE} alike on all nodes, or serve with --enforce-eager."
                )
        return original(*args, **kwargs)

    return get_punica_wrapper


def wrap_get_prompt_logprobs_dict(original: Original) -> Original:
    """``_get_prompt_logprobs_dict`` of model runner V1: the logits that it computes are not those of sampled rows."""
    return _scoring(original)


def wrap_compute_prompt_logprobs(original: Original) -> Original:
    """``compute_prompt_logprobs`` of model runner V2: the same."""
    return _scoring(original)


def wrap_compute_prompt_token_id_logprobs(original: Original) -> Original:
    """``compute_prompt_token_id_logprobs`` of model runner V2: the same."""
    return _scoring(original)


def _scoring(original: Original) -> Original:
    @wraps(original)
    def scoring(*args: Any, **kwargs: Any) -> Any:
        token = _scoring_prompt.set(True)
        try:
            return original(*args, **kwargs)
        finally:
            _scoring_prompt.reset(token)

    return scoring


def wrap_activate_adapter(original: Original) -> Original:
    """``LoRAModelManager.activate_adapter``: tells our operator, since weights enter a slot only here."""

    @wraps(original)
    def activate_adapter(self: Any, lora_id: int) -> Any:
        changed = original(self, lora_id)
        if changed:
            for wrapper in self.punica_wrapper_mapping.values():
                if isinstance(wrapper, RowsWrapper):
                    wrapper.update_slot(self.modules, self.lora_index_to_id.index(lora_id))
        return changed

    return activate_adapter


def wrap_check_and_update_config(original: Original) -> Original:
    """``CpuPlatform.check_and_update_config``: leaves torch.compile on with LoRA.

    vLLM's operators depend on the step's rows, which a compiled graph would keep; ours are opaque to the graph. MoE and
    fully sharded layers call other operators, so with them torch.compile stays off.
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
            _COMPILED.set(lora, not model.enforce_eager)

    return check_and_update_config
