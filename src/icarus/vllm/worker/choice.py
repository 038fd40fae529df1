"""Which model runner a worker makes, and the changes that go with it.

vLLM chooses by the configuration: V2 wherever Triton works and all features are there, else V1. So these changes are
applied by the worker, and not when vLLM loads its plugins.

Each ``wrap_`` function takes a method of vLLM and returns its replacement; see ledger.py.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import vllm
from vllm.logger import init_logger

from icarus.vllm import settings
from icarus.vllm.attributes import attributes
from icarus.vllm.patching import READ_ONCE, Original, apply
from icarus.vllm.worker import identity

logger = init_logger("vllm.icarus")


def wrap_init(original: Original) -> Original:
    """``Worker.__init__``: applies the changes in the runner that this worker is about to make."""

    @wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # its name in vLLM
        original(self, vllm_config, *args, **kwargs)
        from icarus.vllm.ledger import CHECKED, TESTED, changes  # which names this function

        runner = "V2" if vllm_config.use_v2_model_runner else "V1"
        apply(changes(runner), vllm.__version__, TESTED, CHECKED, attributes(runner))
        if settings.reads_kv_once(vllm_config):
            apply(changes(READ_ONCE), vllm.__version__, TESTED, CHECKED, attributes(READ_ONCE))
        identity.mark(_changed_class(runner))
        logger.info("Decoder rows are in model runner %s.", runner)

    return __init__


def _changed_class(runner: str) -> type:
    """The class whose methods are changed; modules of the other runner need not be imported."""
    if runner == "V2":
        from icarus.vllm.worker.runner_v2 import DecoderRowsRunner

        return DecoderRowsRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    changed: type = GPUModelRunner
    return changed
