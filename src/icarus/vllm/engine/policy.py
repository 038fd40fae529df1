"""Which adapters may share the cache: decided once for each loaded adapter, from its verified directory.

Sharing is safe only if the scheduled rows of a request are computed by the base model alone. That follows from the
adapter's files and the base model's weights, and is what ``icarus verify`` checks. A wrong answer would put one model's
K/V into another model's context. So there are three verdicts:

    shares         a verified ICaRus adapter of this base model
    conventional   no ICaRus marker, and verified: vLLM serves it as usual, with the adapter's name in the cache key
    refused        a check failed, or the marker is there and this engine cannot run decoder rows. As plain LoRA such an
                   adapter would be subtly wrong, so it is an error and never a conventional adapter.

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from icarus import adapter
from icarus.errors import AdapterError
from icarus.vllm.engine.description import describe
from icarus.vllm.worker.copies import digest

Locate = Callable[[str], str]


@dataclass(frozen=True)
class Verdict:
    """The decision on one adapter."""

    path: str  # as the request names it
    base_fingerprint: str = ""  # of the base model whose cache it shares; empty for a conventional adapter
    sha256: str = ""  # of the files that were verified (worker/copies.py)
    generation: int = 0  # later verdicts have higher ones
    epoch: int = 0  # replacements of conventional adapters before it
    rank: int = 0  # the highest of its modules

    @property
    def shares(self) -> bool:
        """Whether the adapter shares the cache."""
        return bool(self.base_fingerprint)


class Policy:
    """The decisions of one engine."""

    def __init__(
        self,
        base: Callable[[], Path],
        refusal: str = "",
        locate: Locate = str,
        *,
        heads: bool = False,
        workers: str = "",
    ) -> None:
        """
        Args:
            base: returns the folder of the base model. Called for every adapter; the fingerprint is computed once, for
                the first one with a marker (``icarus.adapter`` caches it).
            refusal: why this engine cannot run ICaRus adapters at all; empty if it can.
            locate: from the path in a request to a local folder, as the engine resolves it.
            heads: whether the base model is one for classification, whose adapters may have a head.
            workers: why this engine's workers cannot be sent an adapter of any kind; empty if they can.
        """
        self._base, self.refusal, self._locate, self._heads = base, refusal, locate, heads
        self._workers = workers
        # Two threads of vLLM come here (v1/engine/core.py:1903), so each change of these is a single operation.
        self._verdicts: dict[int, Verdict] = {}
        self._generations = count(1)
        self._retired: set[int] = set()
        self._replaced = 0  # conventional adapters

    def decide(self, adapter_id: int, path: str, *, again: bool = False) -> Verdict:
        """The verdict on the adapter that the engine knows as ``adapter_id``.

        It stands until the adapter is loaded ``again``, whatever happens to the folder and whatever path a request
        names: a request that was sent before its adapter was replaced names the old path.

        Raises:
            AdapterError: the adapter is refused, cannot replace its predecessor, or was unloaded. An older verdict then
                stands.
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

    def note(self, adapter_id: int, verdict: Verdict | None) -> None:
        """Let a verdict stand, or none: a load has succeeded, or the adapter was removed."""
        if verdict is None:
            self._verdicts.pop(adapter_id, None)
            return
        self._replaced = max(self._replaced, verdict.epoch)
        self._verdicts[adapter_id] = verdict

    def retire(self, adapter_id: int) -> None:
        """Note that an adapter was unloaded and that its id will never be used again; ``decide`` then refuses it."""
        self._verdicts.pop(adapter_id, None)
        self._retired.add(adapter_id)

    def judge(self, path: str, adapter_id: int) -> Verdict:
        """The verdict that ``decide`` would reach now, without noting it.

        Raises:
            AdapterError: the adapter is refused, or cannot replace its predecessor.
        """
        verdict, known = self._judge(path), self._verdicts.get(adapter_id)
        if known and known.shares != verdict.shares:
            # Requests that run now were batched as the other kind.
            raise AdapterError(
                f"{path} cannot replace {known.path}: one is an ICaRus adapter and the other is not; load it under "
                "another name."
            )
        if known and not verdict.shares and verdict.sha256 != known.sha256:
            # Running requests go on with new weights over K/V of the old ones, so no later request may find either.
            return replace(verdict, epoch=self._replaced + 1)
        return verdict

    def _judge(self, path: str) -> Verdict:
        folder = Path(self._locate(path))
        if self._workers:
            raise AdapterError(f"{folder} cannot be served here: {self._workers}.")
        shares = adapter.is_icarus(folder)
        if shares and self.refusal:
            raise AdapterError(f"{folder} is an ICaRus adapter, which cannot be served here: {self.refusal}.")
        try:
            sha256 = digest(folder)  # before it is verified, so that files written in between do not pass for verified
        except AdapterError:
            describe(folder, self._base, heads=self._heads)  # knows better what is wrong
            raise
        described = describe(folder, self._base, heads=self._heads)
        return Verdict(
            path, described.base_fingerprint, sha256, next(self._generations), self._replaced, described.rank
        )
