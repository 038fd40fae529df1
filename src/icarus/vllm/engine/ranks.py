"""Whether all workers of an engine run what the engine core takes for granted (worker/identity.py).

Nothing here imports vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from icarus.vllm.patching import Original
from icarus.vllm.state import Attached
from icarus.vllm.worker.identity import ATTRIBUTE, identity, standing

logger = logging.getLogger("vllm.icarus.ranks")  # below vLLM's own logger, so that it prints like one


@dataclass(frozen=True)
class Refusals:
    """What workers cannot serve, and why; empty where they can."""

    adapters: str = ""  # of either kind
    sharing: str = ""  # ICaRus adapters


REFUSALS = Attached[Refusals]("refusals")
"""On an engine core with LoRA."""


def wrap_initialize_kv_caches(original: Original) -> Original:
    """``EngineCore._initialize_kv_caches``: asks the workers when they are up and nothing else is sent to them.

    An adapter may come with a request, which enters the core in a thread that must not send anything.
    """

    @wraps(original)
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        layout = original(self, vllm_config)
        if vllm_config.lora_config is not None:
            answers = self.model_executor.collective_rpc(getattr, args=(ATTRIBUTE, None))
            REFUSALS.set(self, judge(answers, identity()))
            logger.info("%s (%s)", identity(), standing())
        return layout

    return _initialize_kv_caches


def judge(answers: Sequence[object], wanted: str) -> Refusals:
    """What the workers' answers, by rank, leave to be served.

    Args:
        answers: of ``worker.identity.answer``, or whatever else a worker has said.
        wanted: the identity of the engine core.
    """
    sharing = ""
    for rank, answer in enumerate(answers):
        match answer:
            case (str(plugin), str(unfit)) if plugin == wanted:
                sharing = sharing or (unfit and f"rank {rank} {unfit}")
            case (str(plugin), str()):
                return _neither(f"rank {rank} runs {plugin}, and the engine core {wanted}: install one version of both")
            case _:
                return _neither(
                    f"rank {rank} runs vLLM without ICaRus: install icarus-llm there, and name icarus in VLLM_PLUGINS "
                    "if that is set"
                )
    return Refusals(sharing=sharing)


def _neither(reason: str) -> Refusals:
    return Refusals(adapters=reason, sharing=reason)
