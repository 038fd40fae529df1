"""Loading and unloading over HTTP: what the front end adds before and after the engine hears of it.

vLLM answers 500 to whatever goes wrong in the engine. An adapter that is damaged, of another base model, too large or
outside the allowed folders is the client's error, and says so here. And vLLM's unloading takes a name away, but leaves
the adapter in the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.logger import init_logger
from vllm.lora.utils import get_adapter_absolute_path

from icarus.errors import InputError
from icarus.vllm.engine.attached_policy import policy_of
from icarus.vllm.patching import Original
from icarus.vllm.server import folders

logger = init_logger("vllm.icarus.loading")

UNLOAD_GRACE_S = 5.0
"""Seconds in which a request that has looked up its model reaches the engine's list of requests."""


def wrap_load_lora_adapter(original: Original) -> Original:
    """``OpenAIServingModels.load_lora_adapter``: refusals are 400, or 403 for a path that clients may not name."""

    @wraps(original)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        if request.lora_name and request.lora_path:
            if (within := folders.allowed()) is not None:
                if (folder := folders.permitted(request.lora_path, within)) is None:
                    return _refused(
                        f"{request.lora_path!r} is outside the folders that adapters may be loaded from; start the "
                        "server with --allow-adapters-from to allow it.",
                        HTTPStatus.FORBIDDEN,
                    )
                request.lora_path = str(folder)  # a link that is changed now leads nowhere else
            try:
                await asyncio.to_thread(_check, self, request)
            except InputError as error:
                return _refused(str(error), HTTPStatus.BAD_REQUEST)
        result = await original(self, request, base_model_name)
        if not isinstance(result, ErrorResponse):
            # Noted here, so that no request waits for it, and the next replacement is compared with it.
            await asyncio.to_thread(_note, self, request.lora_name)
        return result

    return load_lora_adapter


def wrap_unload_lora_adapter(original: Original) -> Original:
    """``OpenAIServingModels.unload_lora_adapter``: an ICaRus adapter leaves the engine with its last request."""

    @wraps(original)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        loaded = self.lora_requests.get(request.lora_name)
        result = await original(self, request)
        if loaded is not None and not isinstance(result, ErrorResponse):
            known = policy_of(self.input_processor).known(loaded.lora_int_id)
            if known and known.shares:
                task = asyncio.create_task(_release(self, loaded.lora_int_id))
                _releases.add(task)
                task.add_done_callback(_releases.discard)
        return result

    return unload_lora_adapter


_releases: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive


async def _release(models: Any, lora_id: int) -> None:
    """A request that comes after all is refused here: the engine would have to read the adapter anew, in a step."""
    engine = models.engine_client
    await asyncio.sleep(UNLOAD_GRACE_S)
    while _used(engine.output_processor.request_states.values(), lora_id):
        await asyncio.sleep(1.0)
    policy_of(models.input_processor).retire(lora_id)  # vLLM's front end gives each load a new id
    try:
        await engine.remove_lora(lora_id)
    except Exception as error:  # the server may be on its way out
        logger.warning("An unloaded adapter was not removed from the engine: %s", error)


def _used(states: Iterable[Any], lora_id: int) -> bool:
    return any(state.lora_request is not None and state.lora_request.lora_int_id == lora_id for state in states)


def _check(models: Any, request: Any) -> None:
    """Raise InputError for an adapter that the engine would refuse."""
    config = models.engine_client.vllm_config.lora_config
    folder = Path(get_adapter_absolute_path(request.lora_path))
    if config is None or not folder.is_dir():
        return  # vLLM has its own answers: 500 and 404
    loaded = models.lora_requests.get(request.lora_name)
    policy_of(models.input_processor).judge(request.lora_path, loaded.lora_int_id if loaded else 0)  # ids begin with 1
    rank = folders.describe(folder, None).rank
    if rank > config.max_lora_rank:
        raise InputError(
            f"{folder} has rank {rank} and this server has room for {config.max_lora_rank}; start it with "
            f"--max-lora-rank {rank} or more."
        )


def _note(models: Any, name: str) -> None:
    """The front end's verdict on what the engine has just loaded, which must not fail the answer."""
    if (loaded := models.lora_requests.get(name)) is None:  # unloaded in the meantime
        return
    try:
        policy_of(models.input_processor).decide(loaded.lora_int_id, loaded.lora_path, again=True)
    except InputError as error:  # the folder changed in the meantime
        logger.warning("%s is served, but its folder is not sound any more: %s", name, error)


def _refused(message: str, status: HTTPStatus) -> ErrorResponse:
    kind = "PermissionDeniedError" if status is HTTPStatus.FORBIDDEN else "BadRequestError"
    return create_error_response(message=message, err_type=kind, status_code=status, param="lora_path")
