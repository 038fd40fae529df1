"""The marks on a request whose adapter was verified, and on one whose adapter shares the cache.

The engine core decides (engine/policy.py) and replaces the request's ``LoRARequest`` by a subclass below. It travels
with the request: to the cache key, to KV events, and by pickle to every worker. So all of them follow one decision.
"""

from __future__ import annotations

from vllm.lora.request import LoRARequest


class VerifiedLoRARequest(LoRARequest):  # type: ignore[misc]  # mypy is told not to follow vLLM
    """The LoRA request of a verified adapter, of either kind."""

    sha256: str = ""  # of the files that were verified (worker/copies.py)
    generation: int = 0  # of the verdict: a later one is higher
    epoch: int = 0  # how many conventional adapters had been replaced by then: the mark of their K/V


class SharedLoRARequest(VerifiedLoRARequest):
    """The LoRA request of a verified ICaRus adapter."""

    @property
    def adapter_id(self) -> None:
        """None: KV events and connectors put this into the key of a block (v1/core/block_pool.py:368, 551)."""

    @property
    def name(self) -> None:
        """None, for the same readers; ``lora_name`` is what the client asked for."""


def decoded_ids(requests: dict[int, LoRARequest]) -> set[int]:
    """The LoRA ids whose requests need decoder rows."""
    return {lora_id for lora_id, request in requests.items() if isinstance(request, SharedLoRARequest)}
