"""The entry point (group ``vllm.general_plugins``) that vLLM calls in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Apply the ledger. Calling it again changes nothing.

    Raises:
        PatchError: the installed vLLM differs from those that the ledger was written for.
    """
    import vllm

    from icarus.vllm.attributes import attributes
    from icarus.vllm.ledger import CHECKED, TESTED, changes
    from icarus.vllm.patching import apply

    apply(changes(), vllm.__version__, TESTED, CHECKED, attributes())
    _add_members()


def _add_members() -> None:
    """What workers and engine cores are asked for, beside what the ledger changes."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    from icarus.vllm.counters import READ_COUNTERS
    from icarus.vllm.engine.counting import read
    from icarus.vllm.worker.identity import ATTRIBUTE, answer, identity

    setattr(WorkerBase, ATTRIBUTE, property(answer))
    setattr(EngineCore, ATTRIBUTE, staticmethod(identity))
    setattr(EngineCore, READ_COUNTERS, read)
