"""What ``icarus serve`` serves, and the flags and variables that it calls vLLM with.

Adapters are verified here, before an engine starts. Our defaults for vLLM's flags give way to what the user says on the
command line or in vLLM's ``--config`` file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from icarus import adapter, base_model, model_folder, processor, vllm_environment
from icarus.errors import InputError
from icarus.vllm import settings
from icarus.vllm.engine.description import describe
from icarus.vllm.server import folders, watch
from icarus.vllm.server.flags import given, number, several_servers, value, values

MIN_LORA_SLOTS = 8
"""Default of ``--max-loras``, the number of adapters that can be in one step, unless more are served."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``--max-lora-rank`` (``MaxLoRARanks`` in vllm/config/lora.py)."""

DEFAULT_RANK = 16
"""Default of ``--max-lora-rank`` where no adapter is served at the start."""

PLUGIN_NAME = "icarus"
"""The plugin's entry point, which ``VLLM_PLUGINS`` may name."""

MIDDLEWARE = "icarus.vllm.server.middleware.Middleware"


@dataclass(frozen=True)
class Served:
    """One adapter that is loaded at the start."""

    name: str
    folder: Path
    rank: int
    base_fingerprint: str  # empty for a conventional adapter


@dataclass(frozen=True)
class Plan:
    """What is served, and how vLLM is called."""

    base: str  # as the user calls it
    names: tuple[str, ...]  # as clients call it
    model: str  # as vLLM calls it
    adapters: tuple[Served, ...]
    watched: Path | None  # the folder of --adapter-dir
    flags: list[str]  # for vLLM
    environment: dict[str, str]  # variables to set
    dtype: processor.Choice | None = None  # where it is not left to vLLM


def plan(options: argparse.Namespace, environment: Mapping[str, str]) -> Plan:
    """Verify what is to be served, and decide how vLLM is called.

    Args:
        options: of ``serve.add_arguments``.
        environment: variables that are set.

    Raises:
        InputError: the base model, an adapter or a flag cannot be served.
    """
    words: list[str] = options.rest
    present = given(words)
    if "lora-modules" in present:
        raise InputError("--lora-modules is set by icarus serve; name the adapters with --adapters NAME=PATH.")
    _check_lora(options, without="no-enable-lora" in present or values(words, "enable-lora") == ["False"])
    if options.read_kv_once and "additional-config" in present:
        raise InputError(
            f'--read-kv-once is a key of --additional-config; add "{settings.READ_KV_ONCE}": true to yours instead.'
        )
    names = tuple(values(words, "served-model-name")) or (options.base,)
    if taken := [name for name in options.adapters if name in names]:
        raise InputError(f"Adapter {taken[0]!r} has the name of the base model; choose another name.")
    model = base_model.resolve(options.base)
    # Only the engine has the weights of another revision; it verifies the adapters, too, when it starts.
    base = None if "revision" in present else base_model.folder(options.base)
    classifies = value(words, "runner", "generate") != "generate" or "convert" in present
    adapters = tuple(_served(name, path, base, classifies=classifies) for name, path in options.adapters.items())
    _check_room(adapters, number(words, "max-lora-rank", LORA_RANKS[-1]))
    watched = _watched(options.adapter_dir)
    dtype = None if "dtype" in present or base is None else _dtype(base)
    several = several_servers(words)
    if several and watched:
        raise InputError("--adapter-dir needs one API server: set --api-server-count 1.")
    if options.allow_adapters_from:
        _check_clients_may_load(environment, several=several)
    allowed = [*map(_beside, adapters), *options.allow_adapters_from, *filter(None, [watched])]
    return Plan(
        base=options.base,
        names=names,
        model=model,
        adapters=adapters,
        watched=watched,
        flags=[
            *_flags(options.base, adapters, watched, present),
            *(["--dtype", dtype.dtype] if dtype else []),
            *([f"--additional-config.{settings.READ_KV_ONCE}", "true"] if options.read_kv_once else []),
            *words,
        ],
        environment=_environment(environment, allowed, watched, loading=not several),
        dtype=dtype,
    )


def _check_lora(options: argparse.Namespace, *, without: bool) -> None:
    flags = {
        "--adapters": options.adapters,
        "--adapter-dir": options.adapter_dir,
        "--allow-adapters-from": options.allow_adapters_from,
        "--read-kv-once": options.read_kv_once,
    }
    if useless := [flag for flag, value in flags.items() if value and without]:
        raise InputError(f"{useless[0]} needs LoRA, which --no-enable-lora turns off; take one of them out.")


def _check_clients_may_load(environment: Mapping[str, str], *, several: bool) -> None:
    if several:
        raise InputError("--allow-adapters-from needs one API server: set --api-server-count 1.")
    if environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1").strip().lower() not in ("1", "true"):
        raise InputError(
            "--allow-adapters-from has no effect while VLLM_ALLOW_RUNTIME_LORA_UPDATING turns loading off; leave one "
            "of them out."
        )


def _served(name: str, path: str, base: Path | None, *, classifies: bool) -> Served:
    folder = adapter.locate(path).resolve()
    described = describe(folder, lambda: base, heads=classifies)
    return Served(name, folder, described.rank, described.base_fingerprint)


def _dtype(base: Path) -> processor.Choice | None:
    """vLLM takes bfloat16 unless the checkpoint says otherwise, on every processor."""
    count = model_folder.parameters(base)
    if vllm_environment.has_accelerator() or count is None or not processor.slow_in_bfloat16():
        return None
    return processor.choose(count)


def _check_room(adapters: Sequence[Served], room: int) -> None:
    """``room`` is the user's ``--max-lora-rank``, which vLLM compares with ranks when the engine has started."""
    if too_large := [served for served in adapters if served.rank > room]:
        name, rank = too_large[0].name, too_large[0].rank
        raise InputError(f"Adapter {name!r} has rank {rank} and --max-lora-rank is {room}; raise it, or leave it out.")


def _watched(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    if not folder.is_dir():
        raise InputError(f"--adapter-dir {folder} is not a folder; create it, or name another.")
    return folder.resolve()


def _beside(served: Served) -> Path:
    """The folder that holds an adapter, or the adapter alone if that is the root folder."""
    parent = served.folder.parent
    return served.folder if parent == parent.parent else parent


# ------------------------------------------------------------------------------------------------- flags


def _flags(base: str, adapters: Sequence[Served], watched: Path | None, present: set[str]) -> list[str]:
    """Flags for vLLM beside those that are ``present``."""
    ranks = [served.rank for served in adapters] + _ranks_in(watched)
    defaults = {
        "enable-lora": [],
        "max-loras": [str(max(MIN_LORA_SLOTS, len(ranks)))],
        "max-lora-rank": [str(allowed_rank(max(ranks, default=DEFAULT_RANK)))],
        "enable-prompt-tokens-details": [],
        "served-model-name": [base],
    }
    if "data-parallel-size" in present:  # vLLM would start one API server for each engine
        defaults["api-server-count"] = ["1"]
    flags = ["--middleware", MIDDLEWARE]
    if adapters:
        flags += ["--lora-modules", *(_module(base, served) for served in adapters)]
    for name, words in defaults.items():
        if name not in present:
            flags += [f"--{name}", *words]
    return flags


def _module(base: str, served: Served) -> str:
    return json.dumps({"name": served.name, "path": str(served.folder), "base_model_name": base})


def _ranks_in(watched: Path | None) -> list[int]:
    """Ranks of the adapters that are sound; the server reports the others when it looks at the folder."""
    if watched is None:
        return []
    ranks = []
    for name in watch.scan(watched):
        try:
            ranks.append(describe(watched / name, lambda: None, heads=True).rank)
        except InputError:
            continue
    return ranks


def allowed_rank(rank: int) -> int:
    """The least value of ``--max-lora-rank`` with room for an adapter of this rank.

    Raises:
        InputError: vLLM has room for none.
    """
    if rank > LORA_RANKS[-1]:
        raise InputError(f"vLLM serves ranks up to {LORA_RANKS[-1]} and an adapter has {rank}; retrain it with less.")
    return next(allowed for allowed in LORA_RANKS if allowed >= rank)


# ------------------------------------------------------------------------------------------------- variables


def _environment(
    current: Mapping[str, str], allowed: Sequence[Path], watched: Path | None, *, loading: bool
) -> dict[str, str]:
    """Variables to set, which vLLM's processes inherit.

    Args:
        current: what is set; where it is vLLM's, it stays.
        allowed: the folders that clients may load adapters from.
        watched: the folder whose changes the server follows.
        loading: whether adapters can be loaded while the server runs.
    """
    variables = {
        folders.ALLOWED_VARIABLE: os.pathsep.join(dict.fromkeys(str(folder.resolve()) for folder in allowed)),
        **vllm_environment.variables(current),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": current.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", str(int(loading))),
        watch.WATCHED_VARIABLE: str(watched or ""),
    }
    if (plugins := current.get("VLLM_PLUGINS")) is not None and PLUGIN_NAME not in plugins.split(","):
        variables["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, PLUGIN_NAME]))
    return variables
