"""Loading and unloading over HTTP: what the front end does before and after it calls the engine.

vLLM answers 500 to any error in the engine. An adapter that is damaged, of another base model, too large or outside the
allowed folders is the client's error, so it is refused here. And vLLM's unloading removes an adapter's name but leaves
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
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.utils import get_adapter_absolute_path

from icarus.errors import InputError
from icarus.vllm.engine.attached_policy import policy_of
from icarus.vllm.patching import Original
from icarus.vllm.server import cores, folders
from icarus.vllm.server.names import check_name
from icarus.vllm.worker.adapters import REFUSED

logger = init_logger("vllm.icarus.loading")

UNLOAD_GRACE_S = 5.0
"""A request that has looked up its model is in the engine's list of requests within this time."""


# ------------------------------------------------------------------------------------------------- loading


def wrap_load_lora_adapter(original: Original) -> Original:
    """``OpenAIServingModels.load_lora_adapter``: refuses with 400, or with 403 a path that clients may not name."""

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
                request.lora_path = str(folder)  # so that no link can be changed in the meantime
            try:
                await asyncio.to_thread(_check, self, request)
                await cores.check(self.engine_client.engine_core)
            except InputError as error:
                return _refused(str(error), HTTPStatus.BAD_REQUEST)
            except LoRAAdapterNotFoundError as error:
                return create_error_response(error)
        response = await original(self, request, base_model_name)
        if isinstance(response, ErrorResponse) and REFUSED in response.error.message:
            return _refused(response.error.message.partition(REFUSED)[2], HTTPStatus.BAD_REQUEST)
        if not isinstance(response, ErrorResponse):
            # Decided here, so that no request has to wait for it and the next replacement is compared with it.
            await asyncio.to_thread(_decide, self, request.lora_name)
        return response

    return load_lora_adapter


def _check(models: Any, request: Any) -> None:
    """Refuse what the engine would refuse, and names that would answer for others.

    Raises:
        InputError: the name or the adapter is refused.
        LoRAAdapterNotFoundError: there is no such folder.
    """
    config = models.engine_client.vllm_config.lora_config
    check_name(request.lora_name, (config and config.default_mm_loras) or ())
    folder = Path(get_adapter_absolute_path(request.lora_path))
    if config is None:
        return  # vLLM answers this itself, with 500
    if not _exists(folder):
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
    loaded = models.lora_requests.get(request.lora_name)
    adapter_id = loaded.lora_int_id if loaded else 0  # ids start at 1
    rank = policy_of(models.input_processor).judge(request.lora_path, adapter_id).rank
    if rank > config.max_lora_rank:
        raise InputError(
            f"{folder} has rank {rank} and this server has room for {config.max_lora_rank}; start it with "
            f"--max-lora-rank {rank} or more."
        )


def _exists(folder: Path) -> bool:
    """Whether there is such a folder.

    Raises:
        InputError: it is a file, or its path cannot be one.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file and an adapter is a folder; name the folder that it is in.")
        return folder.exists()
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); choose another path.") from error


def _decide(models: Any, name: str) -> None:
    """Take the front end's own decision on what the engine has just loaded. It must not fail the answer."""
    if (loaded := models.lora_requests.get(name)) is None:  # unloaded in the meantime
        return
    try:
        policy_of(models.input_processor).decide(loaded.lora_int_id, loaded.lora_path, again=True)
    except InputError as error:  # the folder changed in the meantime
        logger.warning("%s is served, but its folder has changed and is no longer sound: %s", name, error)


def _refused(message: str, status: HTTPStatus) -> ErrorResponse:
    kind = "PermissionDeniedError" if status is HTTPStatus.FORBIDDEN else "BadRequestError"
    return create_error_response(message=message, err_type=kind, status_code=status, param="lora_path")


def wrap_resolve_lora(original: Original) -> Original:
    """``OpenAIServingModels.resolve_lora``: a resolver brings no adapter whose name would answer for others."""

    @wraps(original)
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        try:
            if self.lora_resolvers:
                check_name(lora_name)
                await cores.check(self.engine_client.engine_core)
        except InputError as error:
            return _refused(str(error), HTTPStatus.BAD_REQUEST)
        return await original(self, lora_name)

    return resolve_lora


# ------------------------------------------------------------------------------------------------- unloading


def wrap_unload_lora_adapter(original: Original) -> Original:
    """``OpenAIServingModels.unload_lora_adapter``: an adapter leaves the engine with its last request."""

    @wraps(original)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        loaded = self.lora_requests.get(request.lora_name)
        response = await original(self, request)
        if loaded is not None and not isinstance(response, ErrorResponse):
            verdict = policy_of(self.input_processor).known(loaded.lora_int_id)
            if verdict:
                task = asyncio.create_task(_release(self, loaded.lora_int_id))
                _releases.add(task)
                task.add_done_callback(_releases.discard)
        return response

    return unload_lora_adapter


_releases: set[asyncio.Task[None]] = set()  # asyncio itself keeps no reference to a task


async def _release(models: Any, lora_id: int) -> None:
    """Remove an adapter from the engine when no request uses it.

    A request that comes even later is refused here: to serve it, the engine would have to read the adapter in a step.
    """
    engine = models.engine_client
    await asyncio.sleep(UNLOAD_GRACE_S)
    while _used(engine.output_processor.request_states.values(), lora_id):
        await asyncio.sleep(1.0)
    policy_of(models.input_processor).retire(lora_id)  # vLLM's front end gives each load a new id
    try:
        await engine.remove_lora(lora_id)
    except Exception as error:  # the server may be shutting down
        logger.warning("An unloaded adapter was not removed from the engine: %s", error)


def _used(states: Iterable[Any], lora_id: int) -> bool:
    return any(state.lora_request is not None and state.lora_request.lora_int_id == lora_id for state in states)
