"""Which requests are marked: the engine core decides by its policy, for requests and for loads."""

from __future__ import annotations

from typing import Any

from vllm.lora.request import LoRARequest

from icarus.vllm.engine.policy import Policy, Verdict
from icarus.vllm.marks import SharedLoRARequest, VerifiedLoRARequest


def marked(policy: Policy, request: LoRARequest | None) -> LoRARequest | None:
    """The request as it goes on: marked if its adapter shares.

    ``load_inplace`` is cleared. vLLM's front end leaves it on every request of an adapter that was reloaded
    (entrypoints/openai/models/serving.py), and a worker would read the files in each step (lora/worker_manager.py).

    Raises:
        AdapterError: the adapter is refused.
    """
    if request is None:
        return None
    return _mark(request, policy.decide(request.lora_int_id, request.lora_path), load_inplace=False)


def to_load(policy: Policy, request: LoRARequest) -> tuple[LoRARequest, Verdict]:
    """The request of an explicit load or reload, and the verdict that takes effect when the load has succeeded.

    Until then requests follow the last verdict, and workers read their copies of the last files.

    Raises:
        AdapterError: the adapter is refused.
    """
    known = None if request.load_inplace else policy.known(request.lora_int_id)
    verdict = known or policy.judge(request.lora_path, request.lora_int_id)
    return _mark(request, verdict, load_inplace=request.load_inplace), verdict


def _mark(request: LoRARequest, verdict: Verdict, *, load_inplace: bool) -> LoRARequest:
    fields: dict[str, Any] = {name: getattr(request, name) for name in LoRARequest.__struct_fields__}
    fields |= {"load_inplace": load_inplace, "lora_path": verdict.path}
    fields |= {name: getattr(verdict, name) for name in ("sha256", "generation", "epoch")}
    return SharedLoRARequest(**fields) if verdict.shares else VerifiedLoRARequest(**fields)
