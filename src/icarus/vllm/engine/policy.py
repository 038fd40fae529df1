"""Who may share the cache: decided once per loaded adapter, from its verified directory.

Sharing is safe only if the scheduled rows of a request are computed by the base model alone. That is a property of the
adapter's files and of the base model's weights, and what ``icarus verify`` checks. A wrong answer would put one model's
K/V into another model's context, so three answers are kept apart:

    shares         a verified ICaRus adapter of this base model
    conventional   no ICaRus marker: stock vLLM, whose cache key holds the adapter's name
    refused        the marker is there, but a check failed or this engine cannot run decoder rows. Such an adapter would
                   run as plain LoRA and be subtly wrong, so it is an error and never a conventional one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from icarus import adapter
from icarus.errors import AdapterError
from icarus.vllm.worker.copies import digest

Locate = Callable[[str], str]


@dataclass(frozen=True)
class Verdict:
    """What was decided about one adapter."""

    path: str  # as the request names it
    base_fingerprint: str = ""  # of the base model whose cache it shares; empty for a conventional adapter
    sha256: str = ""  # of the files that were verified (copies.py)
    generation: int = 0  # later verdicts have higher ones

    @property
    def shares(self) -> bool:
        """Whether it shares the cache."""
        return bool(self.base_fingerprint)


class Policy:
    """The decisions of one engine."""

    def __init__(self, base: Callable[[], Path], refusal: str = "", locate: Locate = str) -> None:
        """
        Args:
            base: gives the folder of the base model; called for the first adapter with a marker. Its fingerprint is
                computed once (``icarus.adapter.fingerprints`` keeps it).
            refusal: why this engine cannot run ICaRus adapters at all; empty if it can.
            locate: from the path in a request to a local folder, as the engine resolves it.
        """
        self._base, self.refusal, self._locate = base, refusal, locate
        # From two threads of vLLM (v1/engine/core.py:1903): no compound changes.
        self._verdicts: dict[int, Verdict] = {}
        self._generations = count(1)
        self._retired: set[int] = set()

    def decide(self, adapter_id: int, path: str, *, again: bool = False) -> Verdict:
        """The verdict on an adapter that the engine knows as ``adapter_id``.

        It stands until the adapter is loaded ``again``, whatever becomes of the folder and whatever path a request
        names: a request that was sent before its adapter was replaced names the old one.

        Raises AdapterError for an adapter with the ICaRus marker that may not share; an older verdict then stands.
        """
        known = self._verdicts.get(adapter_id)
        if known and not again:
            return known
        if adapter_id in self._retired:
            raise AdapterError(f"{path} was unloaded; load it again.")
        verdict = self._verdicts[adapter_id] = self.judge(path, adapter_id)
        return verdict

    def known(self, adapter_id: int) -> Verdict | None:
        """The verdict that stands, if there is one."""
        return self._verdicts.get(adapter_id)

    def restore(self, adapter_id: int, verdict: Verdict | None) -> None:
        """Let an older verdict stand again, or none: the adapter was not loaded after all, or was taken out."""
        if verdict is None:
            self._verdicts.pop(adapter_id, None)
        else:
            self._verdicts[adapter_id] = verdict

    def retire(self, adapter_id: int) -> None:
        """An adapter whose id never comes again was unloaded: ``decide`` raises AdapterError from now on."""
        self._verdicts.pop(adapter_id, None)
        self._retired.add(adapter_id)

    def judge(self, path: str, adapter_id: int) -> Verdict:
        """What ``decide`` would find now, and raise; nothing is noted."""
        verdict, known = self._judge(path), self._verdicts.get(adapter_id)
        if known and known.shares != verdict.shares:
            # Requests that run now were batched as the other kind.
            raise AdapterError(
                f"{path} cannot replace {known.path}: one is an ICaRus adapter and the other is not; load it under "
                "another name."
            )
        return verdict

    def _judge(self, path: str) -> Verdict:
        folder = Path(self._locate(path))
        if not adapter.is_icarus(folder):
            return Verdict(path)
        if self.refusal:
            raise AdapterError(f"{folder} is an ICaRus adapter, which cannot be served here: {self.refusal}.")
        sha256 = digest(folder)  # before it is verified: what is written in between does not pass for it
        return Verdict(path, adapter.verify(folder, self._base()).base_fingerprint, sha256, next(self._generations))
