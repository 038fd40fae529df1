"""The engine cores behind a front end, which may be on other nodes (``--headless``): calls, and whether they run us.

The calls are of methods that the plugin adds to ``EngineCore``. A core without the plugin answers them with an error,
and does not pass them on to its workers.

Nothing here imports vLLM.
"""

from __future__ import annotations

from typing import Any

from icarus.errors import AdapterError
from icarus.vllm.worker.identity import ATTRIBUTE, identity


async def call(core: Any, method: str) -> list[Any]:
    """The answers of all engine cores; ``core`` is vLLM's ``AsyncMPClient``."""
    if hasattr(core, "call_utility_all_async"):
        answers: list[Any] = await core.call_utility_all_async(method)
        return answers
    return [await core.call_utility_async(method)]  # vLLM 0.31 returns the answer of the first one only


async def check(core: Any) -> None:
    """Adapters are safe where all engine cores run this front end's plugin; another one would serve plain LoRA.

    Raises:
        AdapterError: one of them does not.
    """
    try:
        answers = await call(core, ATTRIBUTE)
    except Exception as error:  # vLLM sends it as text
        raise AdapterError(
            f"An engine core runs vLLM without ICaRus ({error}); install icarus-llm on all nodes, and name icarus in "
            "VLLM_PLUGINS if that is set."
        ) from error
    for answer in answers:
        if answer != identity():
            raise AdapterError(
                f"An engine core runs {answer}, and this front end {identity()}; install one version of both."
            )
