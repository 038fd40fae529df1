"""The policy of an engine core or of a front end, built from vLLM's configuration."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

from vllm.lora.utils import get_adapter_absolute_path

from icarus import hub
from icarus.errors import InputError
from icarus.vllm.engine import limits
from icarus.vllm.engine.policy import Policy
from icarus.vllm.engine.ranks import REFUSALS, Refusals
from icarus.vllm.state import Attached

POLICY = Attached[Policy]("policy")
"""On an engine core, or on the input processor of a front end."""


def policy_of(owner: Any) -> Policy:
    """The policy of an ``EngineCore`` or an ``InputProcessor``; the first call makes it."""
    return POLICY.get_or_make(owner, lambda: _policy(owner))


def _policy(owner: Any) -> Policy:
    """Only an engine core has workers, and a scheduler, which knows the kinds of cache that the model keeps."""
    config, workers = owner.vllm_config, REFUSALS.get(owner) or Refusals()
    layout = getattr(getattr(owner, "scheduler", None), "kv_cache_config", None)
    groups = layout.kv_cache_groups if layout else ()
    refusal = (
        limits.refusal(config)
        or limits.room_refusal(config.scheduler_config)
        or limits.cache_refusal(group.kv_cache_spec for group in groups)
        or workers.sharing
    )
    heads = config.model_config.runner_type != "generate"
    base = cache(partial(_base_folder, config))
    return Policy(base, refusal, get_adapter_absolute_path, heads=heads, workers=workers.adapters)


def _base_folder(config: Any) -> Path:
    """The folder of the weights that the engine has loaded.

    Raises:
        InputError: the weights are neither in a local folder nor in the hub's cache.
    """
    model = config.model_config.model
    if Path(model).is_dir():
        return Path(model)
    try:
        return hub.snapshot(
            model,
            ["*.json", "*.safetensors"],
            revision=config.model_config.revision,
            cache=config.load_config.download_dir,
            cached=True,  # what the engine has loaded, and no newer revision
        )
    except hub.DownloadError as error:
        raise InputError(
            f"The weights of {model} are not in a local folder or the hub's cache, so adapters cannot be "
            "checked against them: serve the base model from a local folder."
        ) from error
