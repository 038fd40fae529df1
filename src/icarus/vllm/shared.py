"""The mark on a request whose adapter shares the cache.

The engine core decides (policy.py) and replaces the request's ``LoRARequest`` by this subclass, which then travels with
the request: to the cache key, to KV events, and by pickle to every worker. So all of them follow one decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace
from vllm.lora.request import LoRARequest

from icarus import adapter
from icarus.errors import AdapterError
from icarus.vllm.policy import Policy


class SharedLoRARequest(LoRARequest):  # type: ignore[misc]  # vLLM is untyped to a checker that lacks it
    """A LoRA request of a verified ICaRus adapter."""

    base_fingerprint: str = ""

    @property
    def adapter_id(self) -> None:
        """No adapter: KV events and connectors take it for the key of a block (v1/core/block_pool.py:368, 551)."""

    @property
    def name(self) -> None:
        """No adapter either, for the same readers; ``lora_name`` is what the client asked for."""


def marked(policy: Policy, request: LoRARequest | None, *, load: bool = False) -> LoRARequest | None:
    """The request as it goes on: marked if its adapter shares. ``load``: it comes from an explicit (re)load.

    Only that call keeps ``load_inplace``: vLLM's front end leaves the flag on every later request of a reloaded adapter
    (entrypoints/openai/models/serving.py), and the worker would read the files in each step (lora/worker_manager.py).
    """
    if request is None:
        return None
    verdict = policy.decide(request.lora_int_id, request.lora_path, again=load and request.load_inplace)
    if not verdict.shares:
        return request
    fields: dict[str, Any] = {name: getattr(request, name) for name in LoRARequest.__struct_fields__}
    fields["load_inplace"] = load and request.load_inplace
    fields["lora_path"] = verdict.path
    return SharedLoRARequest(**fields, base_fingerprint=verdict.base_fingerprint)


def renew(holders: Iterable[Any], loaded: LoRARequest) -> None:
    """Let requests that wait or run name the adapter that has just replaced theirs.

    One that named the old folder would have it read again, for everybody, once the adapter was evicted from memory.
    """
    current = replace(loaded, load_inplace=False)
    for holder in holders:
        if holder.lora_request is not None and holder.lora_request.lora_int_id == loaded.lora_int_id:
            holder.lora_request = current


def check_files(request: LoRARequest, folder: str, modules: list[str]) -> None:
    """Raise AdapterError where files that a worker has just read are not what the engine core decided upon.

    The folder may have changed since, for example while the adapter was evicted from memory.
    """
    config = adapter.is_icarus(folder)
    if isinstance(request, SharedLoRARequest):
        bad = [module for module in modules if adapter.feeds_kv(module)]
        if not config or bad:
            what = f"adapts {bad[0]}, which feeds K or V" if bad else "has lost its ICaRus marker"
            raise AdapterError(f"{folder} has changed since it was verified: it {what}; load the adapter again.")
    elif config:
        raise AdapterError(f"{folder} became an ICaRus adapter after it was loaded as another; load it again.")


def decoded_ids(requests: dict[int, LoRARequest]) -> list[int]:
    """LoRA ids whose requests need decoder rows."""
    return [lora_id for lora_id, request in requests.items() if isinstance(request, SharedLoRARequest)]
