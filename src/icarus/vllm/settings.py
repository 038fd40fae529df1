"""What a user may set of the plugin, in vLLM's configuration: all processes of an engine get the same.

Nothing here imports vLLM.
"""

from __future__ import annotations

from typing import Any

READ_KV_ONCE = "icarus_read_kv_once"
"""Of vLLM's ``--additional-config``: on GPUs, a decode and its decoder row read the cache together."""


def reads_kv_once(config: Any) -> bool:
    """Whether this is set in a ``VllmConfig``."""
    additional = config.additional_config
    return isinstance(additional, dict) and bool(additional.get(READ_KV_ONCE))
