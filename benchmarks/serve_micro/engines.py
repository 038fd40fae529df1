"""How each engine is started, and the adapters that it gets."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.serve_micro.engine_process import EngineProcess
from benchmarks.serve_micro.plan import ADAPTERS, BLOCK, RANK, SEED, Message
from icarus import base_model
from icarus.bench import checkpoints
from icarus.vllm_environment import variables

ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "block_size": BLOCK,
    "enable_prefix_caching": True,
    "seed": SEED,
}
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": RANK}
ENVIRONMENT = {
    **variables({}),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB for each engine
    "VLLM_NO_USAGE_STATS": "1",  # its thread would run beside the first measurements
}
_WITH_PLUGIN = {"conventional", "icarus"}

Adapters = dict[str, dict[str, str]]
"""By system: the folders of its adapters by name."""


def has_vllm() -> bool:
    """A folder of that name on the path is a namespace package, which has no origin."""
    return getattr(importlib.util.find_spec("vllm"), "origin", None) is not None


def make_adapters(base: str, folder: Path, systems: Iterable[str]) -> Adapters:
    """Adapters with random weights in ``folder``: of one kind for stock and conventional, of the other for icarus."""
    kinds = {system: "icarus" if system == "icarus" else "conventional" for system in systems if system != "base"}
    checkpoints.make_adapters(base_model.folder(base), folder, sorted(set(kinds.values())), ADAPTERS, RANK, SEED)
    names = [checkpoints.adapter_name(number) for number in range(ADAPTERS)]
    return {
        system: {name: str(folder / kinds[system] / name) for name in names} if system in kinds else {}
        for system in systems
    }


def weights(adapters: Mapping[str, str]) -> int:
    """Numbers in one adapter."""
    from safetensors import safe_open

    if not adapters:
        return 0
    with safe_open(Path(next(iter(adapters.values()))) / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # no mapping


def start(
    base: str, dtype: str, adapters: Adapters, folder: Path, stack: ExitStack
) -> tuple[dict[str, EngineProcess], dict[str, Message]]:
    """An engine for each system of ``adapters``, ready, and what each says of itself."""
    engines, about = {}, {}
    for system, own in adapters.items():
        started = time.perf_counter()
        process = EngineProcess(system, folder / f"{system}.log", environment(system, os.environ))
        engines[system] = stack.enter_context(process)
        options = {"model": str(base_model.folder(base)), "dtype": dtype, **ENGINE}
        if system != "base":
            options |= LORA
        about[system] = engines[system].ask({"engine": options, "adapters": own})
        print(f"engine {system}: ready in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return engines, about


def environment(system: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Of an engine: the caller's, less what would make a system something else than its name says."""
    kept = {name: value for name, value in inherited.items() if not name.startswith("ICARUS_CPU")}
    threads = kept.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    plugins = "icarus" if system in _WITH_PLUGIN else ""
    return {**kept, **ENVIRONMENT, "OMP_NUM_THREADS": threads, "VLLM_PLUGINS": plugins}
