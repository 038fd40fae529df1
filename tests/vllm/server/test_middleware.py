"""Paths that vLLM's API key leaves open ask for it, too."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from httpx import ASGITransport, AsyncClient

from icarus import adapter
from icarus.vllm.engine.attached_policy import POLICY
from icarus.vllm.engine.policy import Policy
from icarus.vllm.server.middleware import Middleware
from tiny_models import tiny


async def answers(scope: Any, receive: Any, send: Any) -> None:
    """An application that tells the path it was asked for."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def ask(path: str, key: str | None, *, given: str = "") -> tuple[int, str]:
    state = SimpleNamespace(args=SimpleNamespace(api_key=[key] if key else None))

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await Middleware(answers)({**scope, "app": SimpleNamespace(state=state)}, receive, send)

    async def once() -> tuple[int, str]:
        async with AsyncClient(transport=ASGITransport(server), base_url="http://test") as client:
            headers = {"Authorization": f"Bearer {given}"} if given else {}
            reply = await client.post(path, headers=headers)
            return reply.status_code, reply.text

    return asyncio.run(once())


@pytest.mark.parametrize("path", ["/adapters", "/adapters/sql", "/invocations"])
def test_sagemakers_paths_ask_for_the_key(path: str) -> None:
    assert ask(path, "secret")[0] == 401
    assert ask(path, "secret", given="wrong")[0] == 401
    assert ask(path, "secret", given="secret") == (200, path)
    assert ask(path, None) == (200, path)


def test_a_key_from_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert ask("/adapters", None)[0] == 401


def test_aliases_are_seen_below_v1() -> None:
    """Where vLLM's own check, which is further in, guards them."""
    assert ask("/load_lora_adapter", "secret") == (200, "/v1/load_lora_adapter")


def test_a_watched_folder_that_cannot_be_served_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = tmp_path / "watched"
    adapter.save(adapter.attach(tiny(), rank=2), watched / "sql")
    monkeypatch.setenv("ICARUS_ADAPTER_DIR", str(watched))
    policy = Policy(lambda: pytest.fail("no base model is needed"), refusal="set --pipeline-parallel-size 1")
    models = SimpleNamespace(input_processor=SimpleNamespace())
    POLICY.set(models.input_processor, policy)
    sent: list[Any] = []

    async def never(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("vLLM's own start went on")

    async def start() -> None:
        scope = {"type": "lifespan", "app": SimpleNamespace(state=SimpleNamespace(openai_serving_models=models))}

        async def receive() -> Any:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            sent.append(message)

        await Middleware(never)(scope, receive, send)

    asyncio.run(start())
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
    assert "--pipeline-parallel-size 1" in sent[0]["message"]
    assert str(watched / "sql") in sent[0]["message"]
