"""What a worker says of itself before adapters are served: whose plugin it runs, and whether its runner is changed.

Each process of vLLM loads plugins and chooses its model runner by an environment of its own, and a worker may be on
another node. One that runs a runner without decoder rows would serve an ICaRus adapter as plain LoRA, and write the
adapter's K/V into blocks that everybody reads. So the engine core asks all of them (engine/ranks.py).

It asks by Python's ``getattr`` with a default, which a worker without the plugin can answer, too. An exception would
leave the answers of other workers in their queues (vllm/v1/executor/multiproc_executor.py).

vLLM is imported when a process first says who it is.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from typing import Any

from icarus.vllm import settings
from icarus.vllm.ledger import CHECKED, LEDGER, TESTED
from icarus.vllm.patching import MARK, release
from icarus.vllm.state import Attached

ATTRIBUTE = "icarus_identity"
"""Of a worker: what ``answer`` returns."""

_CHANGED = Attached[str]("changed_by")
"""On a class of model runners: the identity of the plugin that changed it."""


@cache
def identity() -> str:
    """The plugin and the vLLM of this process; two that are equal apply the same ledger to the same vLLM."""
    import vllm

    ledger = hashlib.sha256(repr([(patch.target, patch.parameters, patch.by) for patch in LEDGER]).encode())
    return f"icarus-llm {version('icarus-llm')} (ledger {ledger.hexdigest()[:8]}) on vLLM {vllm.__version__}"


def standing() -> str:
    """What is known of the plugin with this process's vLLM."""
    import vllm

    installed = release(vllm.__version__)
    if installed in TESTED:
        return "tested"
    return "checked by source, and not tested on a build of its own" if installed in CHECKED else "untested"


def mark(runner: type) -> None:
    """Note that this plugin has changed a class of model runners, or made it."""
    _CHANGED.set(runner, identity())


def answer(worker: Any) -> tuple[str, str]:
    """The identity of the plugin in a worker, and why it cannot run decoder rows as it was told (empty if it can)."""
    runner = worker.model_runner
    unfit = _unchanged(type(runner)) or _own_inputs(runner) or _stock_operators(runner) or _reads_twice(runner)
    return identity(), unfit


def _unchanged(runner: type) -> str:
    name = f"{runner.__module__}.{runner.__qualname__}"
    owner = next((kind for kind in runner.__mro__ if _CHANGED.get_own(kind) == identity()), None)
    if owner is None:
        return (
            f"runs the model runner {name}, which has no decoder rows: start all nodes with the same "
            "environment (VLLM_USE_V2_MODEL_RUNNER, VLLM_PLUGINS)"
        )
    for function, wrapper in vars(owner).items():
        if hasattr(wrapper, MARK) and getattr(runner, function) is not wrapper:
            return f"runs the model runner {name}, whose own {function} knows no decoder rows: use vLLM's worker class"
    return ""


def _own_inputs(runner: Any) -> str:
    """On model runner V2, where a model may bring a class that prepares its inputs."""
    state = type(getattr(runner, "model_state", None))
    for function in ("prepare_inputs", "prepare_inputs_embeds"):
        if (prepare := getattr(state, function, None)) and not hasattr(prepare, MARK):
            return (
                f"prepares inputs with {state.__module__}.{state.__qualname__}, whose own {function} knows no decoder "
                "rows: serve another base model"
            )
    return ""


def _reads_twice(runner: Any) -> str:
    """Empty where nobody asked for one pass."""
    if not settings.reads_kv_once(runner.vllm_config):
        return ""
    from icarus.vllm.gpu import attention

    return attention.refusal(runner)


def _stock_operators(runner: Any) -> str:
    """On CPUs; engine/limits.py says what is wrong with vLLM's own, and asks the engine core's environment alone."""
    if runner.device.type != "cpu":
        return ""
    from icarus.vllm.cpu.lora import RowsWrapper

    wrappers = runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
    if all(isinstance(wrapper, RowsWrapper) for wrapper in wrappers):
        return ""
    return "uses vLLM's own LoRA operators: install g++ and leave ICARUS_CPU_LORA unset on all nodes"
