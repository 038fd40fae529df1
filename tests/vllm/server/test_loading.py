"""Unloading: an adapter that shares leaves the engine when nobody uses it any more."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from icarus.errors import AdapterError
from icarus.vllm.engine.attached_policy import POLICY
from icarus.vllm.engine.policy import Policy, Verdict
from icarus.vllm.server import loading


class Models:
    """The parts of vLLM's front end that unloading touches; ``original`` is its own ``unload_lora_adapter``."""

    def __init__(self, *, shares: bool) -> None:
        self.lora_requests = {"sql": SimpleNamespace(lora_int_id=7)}
        self.removed: list[int] = []
        self.states: dict[str, Any] = {"base": SimpleNamespace(lora_request=None)}
        self.engine_client = SimpleNamespace(
            output_processor=SimpleNamespace(request_states=self.states), remove_lora=self.remove
        )
        policy = Policy(lambda: pytest.fail("no base model is needed"))
        policy.note(7, Verdict("/nowhere", "fingerprint" if shares else ""))
        self.input_processor = SimpleNamespace()
        POLICY.set(self.input_processor, policy)

    async def remove(self, lora_id: int) -> None:
        self.removed.append(lora_id)

    async def original(self, request: Any) -> str:
        del self.lora_requests[request.lora_name]
        return "done"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "UNLOAD_GRACE_S", 0.0)
    sleep = asyncio.sleep
    monkeypatch.setattr(loading.asyncio, "sleep", lambda seconds: sleep(0))


async def unload(models: Models) -> None:
    released = loading.wrap_unload_lora_adapter(Models.original)
    assert await released(models, SimpleNamespace(lora_name="sql")) == "done"
    for _ in range(5):
        await asyncio.sleep(0)


def test_it_waits_for_the_last_request() -> None:
    async def story() -> None:
        models = Models(shares=True)
        models.states["one"] = SimpleNamespace(lora_request=SimpleNamespace(lora_int_id=7))
        await unload(models)
        assert models.removed == []
        del models.states["one"]
        for _ in range(5):
            await asyncio.sleep(0)
        assert models.removed == [7]
        with pytest.raises(AdapterError, match="unloaded"):
            loading.policy_of(models.input_processor).decide(7, "/nowhere")

    asyncio.run(story())


def test_conventional_adapters_stay_where_vllm_leaves_them() -> None:
    async def story() -> None:
        models = Models(shares=False)
        await unload(models)
        assert models.removed == []

    asyncio.run(story())
