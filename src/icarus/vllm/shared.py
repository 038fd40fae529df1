"""The mark on a request whose adapter shares the cache.

The engine core decides (policy.py) and replaces the request's ``LoRARequest`` by this subclass, which then travels with
the request: to the cache key, to KV events, and by pickle to every worker. So all of them follow one decision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from icarus import adapter
from icarus.errors import AdapterError
from icarus.vllm.policy import Policy, Verdict


class SharedLoRARequest(LoRARequest):  # type: ignore[misc]  # vLLM is untyped to a checker that lacks it
    """A LoRA request of a verified ICaRus adapter."""

    sha256: str = ""
    generation: int = 0

    @property
    def adapter_id(self) -> None:
        """No adapter: KV events and connectors take it for the key of a block (v1/core/block_pool.py:368, 551)."""

    @property
    def name(self) -> None:
        """No adapter either, for the same readers; ``lora_name`` is what the client asked for."""


def marked(policy: Policy, request: LoRARequest | None) -> LoRARequest | None:
    """The request as it goes on: marked if its adapter shares.

    vLLM's front end leaves ``load_inplace`` on every request of an adapter that was reloaded
    (entrypoints/openai/models/serving.py), and the worker would read the files in each step (lora/worker_manager.py);
    only a load keeps it.
    """
    if request is None:
        return None
    return _mark(request, policy.decide(request.lora_int_id, request.lora_path), load_inplace=False)


def to_load(policy: Policy, request: LoRARequest) -> tuple[LoRARequest, Verdict]:
    """The request of an explicit load, or reload, and the verdict that is to stand when it has succeeded.

    Until then requests go by the last verdict, and workers read what they have a copy of.
    """
    known = None if request.load_inplace else policy.known(request.lora_int_id)
    verdict = known or policy.judge(request.lora_path, request.lora_int_id)
    return _mark(request, verdict, load_inplace=request.load_inplace), verdict


def _mark(request: LoRARequest, verdict: Verdict, *, load_inplace: bool) -> LoRARequest:
    if not verdict.shares:
        return request
    fields: dict[str, Any] = {name: getattr(request, name) for name in LoRARequest.__struct_fields__}
    fields |= {"load_inplace": load_inplace, "lora_path": verdict.path}
    return SharedLoRARequest(**fields, sha256=verdict.sha256, generation=verdict.generation)


def check_conventional(folder: Path) -> None:
    """Raise AdapterError where a worker has just read an ICaRus adapter for a conventional one.

    The folder may have changed since, for example while the adapter was evicted from memory.
    """
    if adapter.is_icarus(folder):
        raise AdapterError(f"{folder} became an ICaRus adapter after it was loaded as another; load it again.")


def decoded_ids(requests: dict[int, LoRARequest]) -> set[int]:
    """LoRA ids whose requests need decoder rows."""
    return {lora_id for lora_id, request in requests.items() if isinstance(request, SharedLoRARequest)}
