"""The entry point (group ``vllm.general_plugins``) that vLLM calls in the front end, engine core and workers."""

from __future__ import annotations


def register() -> None:
    """Apply the ledger; calling it again changes nothing. Raises PatchError where vLLM is another than was tested."""
    import vllm

    from icarus.vllm import ledger

    ledger.apply(ledger.LEDGER, vllm.__version__)
