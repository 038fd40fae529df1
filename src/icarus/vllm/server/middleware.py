"""What ``icarus serve`` adds to vLLM's HTTP server, as one ASGI middleware (vLLM's flag ``--middleware``).

* ``/metrics`` has the plugin's counters behind vLLM's;
* ``/load_lora_adapter`` and ``/unload_lora_adapter``, SGLang's spelling, mean the same with ``/v1`` before them. User
  middleware is outermost in vLLM, so what checks API keys sees the path with ``/v1``;
* SageMaker's paths ask for the API key as those below ``/v1`` do;
* the folder in ``ICARUS_ADAPTER_DIR`` is watched for as long as the server runs.
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
from icarus.vllm.server.watch import WATCHED_VARIABLE, State, Watcher, scan

logger = init_logger("vllm.icarus.middleware")

WATCH_INTERVAL_S = 1.0
"""Time between two looks at that folder."""

PATH_ALIASES = {path: f"/v1{path}" for path in ("/load_lora_adapter", "/unload_lora_adapter")}

UNGUARDED_PATHS = ("/adapters", "/invocations")
"""SageMaker's paths, which load, unload and answer, and which vLLM's ``--api-key`` leaves open."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Middleware:
    """ASGI: passes everything on, but for what the module says."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._scraper = Scraper()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
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
        """vLLM's own check, which looks at paths below ``/v1``."""

        async def app(_: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

        seen = {**scope, "path": f"{scope.get('root_path', '')}/v1{path}"}
        await AuthenticationMiddleware(app, keys)(seen, receive, send)

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's answer with ours behind it. Both are text: headers that ask for another form are dropped."""
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

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server's life. What the watched folder holds at its start is served from the first request on."""
        task = None
        if folder := os.environ.get(WATCHED_VARIABLE):
            models = scope["app"].state.openai_serving_models
            if why := await asyncio.to_thread(_refusal, Path(folder), policy_of(models.input_processor)):
                await receive()
                await send({"type": "lifespan.startup.failed", "message": why})
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
    """The API keys of a server, as vLLM collects them (vllm/entrypoints/serve/middleware/register.py)."""
    return [key for key in (arguments.api_key or [envs.VLLM_API_KEY]) if key]


def _refusal(root: Path, policy: Policy) -> str:
    """Why the server must not start: it cannot serve the ICaRus adapters that are there. Empty if it can."""
    try:
        ours = [name for name in sorted(scan(root)) if adapter.is_icarus(root / name)]
    except (OSError, InputError):  # the watcher tells
        return ""
    if not ours or not policy.refusal:
        return ""
    return f"{root / ours[0]} is an ICaRus adapter, which cannot be served here: {policy.refusal}."


def _watcher(root: Path, models: Any) -> Watcher:
    """Loads by the code of ``/v1/load_lora_adapter``; ``models`` is vLLM's ``OpenAIServingModels``."""

    conventional: dict[str, State | None] = {}  # with what weights the prefix cache knows a name, also after it is gone

    async def load(name: str, folder: Path, replaces: bool) -> str:
        state, ours = scan(root).get(name), adapter.is_icarus(folder)
        if not ours and conventional.get(name, state) != state:
            return (
                "a conventional adapter that changes leaves K/V of its old weights in the prefix cache; save it under "
                "another name"
            )
        request = LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder), load_inplace=replaces)
        answer = await models.load_lora_adapter(request)
        if isinstance(answer, ErrorResponse):
            return str(answer.error.message)
        if not ours:
            conventional[name] = state
        return ""

    async def unload(name: str) -> None:
        await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))

    return Watcher(root, load, unload, logger.warning)
