"""The mark on a request whose adapter shares the cache.

The engine core decides (engine/policy.py) and replaces the request's ``LoRARequest`` by this subclass, which then
travels with the request: to the cache key, to KV events, and by pickle to every worker. So all of them follow one
decision.
"""

from __future__ import annotations

from vllm.lora.request import LoRARequest


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


def decoded_ids(requests: dict[int, LoRARequest]) -> set[int]:
    """LoRA ids whose requests need decoder rows."""
    return {lora_id for lora_id, request in requests.items() if isinstance(request, SharedLoRARequest)}
