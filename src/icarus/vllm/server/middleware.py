"""What ``icarus serve`` adds to vLLM's HTTP server, as one ASGI middleware (vLLM's flag ``--middleware``).

* ``/metrics`` has the plugin's counters after vLLM's.
* ``/load_lora_adapter`` and ``/unload_lora_adapter``, as SGLang spells them, are aliases of the paths below ``/v1``.
  User middleware is outermost in vLLM, so the check of API keys sees the path below ``/v1``.
* SageMaker's paths ask for the API key, as those below ``/v1`` do.
* The folder in ``ICARUS_ADAPTER_DIR`` is watched for as long as the server runs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger

from icarus import adapter
from icarus.errors import InputError
from icarus.vllm.engine.attached_policy import policy_of
from icarus.vllm.engine.policy import Policy
from icarus.vllm.server.metrics import Scraper
from icarus.vllm.server.watch import WATCHED_VARIABLE, Watcher, scan

logger = init_logger("vllm.icarus.middleware")

WATCH_INTERVAL_S = 1.0
"""Time between two looks at the watched folder."""

PATH_ALIASES = {path: f"/v1{path}" for path in ("/load_lora_adapter", "/unload_lora_adapter")}

UNGUARDED_PATHS = ("/adapters", "/invocations")
"""SageMaker's paths, which load, unload and generate, and which vLLM's ``--api-key`` does not guard."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Middleware:
    """An ASGI middleware that passes on everything but what the head of this file lists."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._scraper = Scraper()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if path == "/metrics" and scope.get("method") == "GET":
            await self._metrics(scope, receive, send)
            return
        if path.startswith(UNGUARDED_PATHS) and (keys := _keys(scope["app"].state.args)):
            await self._guard(path, keys, scope, receive, send)
            return
        if path in PATH_ALIASES:
            scope = {**scope, "path": scope.get("root_path", "") + PATH_ALIASES[path]}
        await self.app(scope, receive, send)

    async def _guard(self, path: str, keys: list[str], scope: Scope, receive: Receive, send: Send) -> None:
        """Ask for the API key by vLLM's own check, which looks at paths below ``/v1``."""

        async def app(_: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

        seen = {**scope, "path": f"{scope.get('root_path', '')}/v1{path}"}
        await AuthenticationMiddleware(app, keys)(seen, receive, send)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Append our metrics to vLLM's. Both are plain text, so headers that ask for another form are dropped."""
        ours = await self._scraper.text(scope["app"].state.engine_client)
        headers = [item for item in scope["headers"] if item[0] not in (b"accept", b"accept-encoding")]
        start: Message = {}

        async def append(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [item for item in message["headers"] if item[0].lower() != b"content-length"]
                start.update(message, headers=kept)
                await send(start)
            elif start["status"] == 200 and not message.get("more_body"):
                await send({**message, "body": message.get("body", b"") + ours})
            else:
                await send(message)

        await self.app({**scope, "headers": headers}, receive, append)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Watch the folder while the server runs. What it holds at the start is served from the first request on."""
        task = None
        if folder := os.environ.get(WATCHED_VARIABLE):
            models = scope["app"].state.openai_serving_models
            if refusal := await asyncio.to_thread(_refusal, Path(folder), policy_of(models.input_processor)):
                await receive()
                await send({"type": "lifespan.startup.failed", "message": refusal})
                return
            watcher = _watcher(Path(folder), models)
            await watcher.look(first=True)
            task = asyncio.create_task(watcher.run(WATCH_INTERVAL_S))
        try:
            await self.app(scope, receive, send)
        finally:
            if task is not None:
                task.cancel()


def _keys(arguments: Any) -> list[str]:
    """A server's API keys, as vllm/entrypoints/serve/middleware/register.py collects them."""
    return [key for key in (arguments.api_key or [envs.VLLM_API_KEY]) if key]


def _refusal(root: Path, policy: Policy) -> str:
    """Why the server must not start: it cannot serve an ICaRus adapter in the folder. Empty if it can."""
    try:
        shared = [name for name in sorted(scan(root)) if adapter.is_icarus(root / name)]
    except (OSError, InputError):  # the watcher reports it
        return ""
    if not shared or not policy.refusal:
        return ""
    return f"{root / shared[0]} is an ICaRus adapter, which cannot be served here: {policy.refusal}."


def _watcher(root: Path, models: Any) -> Watcher:
    """A watcher that loads as ``/v1/load_lora_adapter`` does; ``models`` is vLLM's ``OpenAIServingModels``."""

    async def load(name: str, folder: Path, replaces: bool) -> str:
        request = LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder), load_inplace=replaces)
        response = await models.load_lora_adapter(request)
        return str(response.error.message) if isinstance(response, ErrorResponse) else ""

    async def unload(name: str) -> None:
        await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))

    return Watcher(root, load, unload, logger.warning)
