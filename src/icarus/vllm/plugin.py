"""The entry point (group ``vllm.general_plugins``) that vLLM calls in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Apply the ledger. Calling it again changes nothing.

    Raises:
        PatchError: the installed vLLM differs from the tested ones.
    """
    import vllm

    from icarus.vllm.ledger import TESTED, changes
    from icarus.vllm.patching import apply

    apply(changes(), vllm.__version__, TESTED)
