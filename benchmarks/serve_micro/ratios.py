"""How many times as fast one side is as another.

A ratio is of speeds: the peer's seconds over ours, so more is better for us. Its value is the median over starts of the
engines, in each of which it is that of the medians: two starts of one engine differ by several per cent, and within a
start nothing evens that out. Beside it stand the lowest and the highest ratio of two samples of one round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serve_micro.plan import BATCHES

Seconds = Mapping[str, Mapping[str, Sequence[float]]]
"""Of one start of the engines, by measurement and side; samples in the order of rounds."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ``side`` is as ``peer``."""

    measurement: str
    side: str
    peer: str

    def result(self, starts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
        """As it stands in the report, from the samples of each start by side."""
        sides = [(seconds[self.side], seconds[self.peer]) for seconds in starts]
        # A side may take part in one round only.
        paired = [peer / own for ours, theirs in sides for own, peer in zip(ours, theirs, strict=False)]
        ratios = [statistics.median(theirs) / statistics.median(ours) for ours, theirs in sides]
        return {
            "what": f"{self.measurement}: {self.side} over {self.peer}",
            "value": round(statistics.median(ratios), 3),
            "lowest": round(min(paired), 3),
            "highest": round(max(paired), 3),
            "starts": [round(ratio, 3) for ratio in ratios],
        }


def _ratios() -> tuple[Ratio, ...]:
    decodes = [f"decode, batch {batch}" for batch in BATCHES]
    lent = [
        Ratio(measurement, f"base model on {system}", "base")
        for measurement in (*decodes[:-1], "prefill")
        for system in ("stock", "conventional", "icarus")
    ]
    ours = [
        Ratio(measurement, "icarus", peer)
        for measurement in (*decodes, "prefill")
        for peer in ("base", "stock", "conventional")
    ]
    return (*lent, *ours, Ratio("chain", "icarus", "stock"), Ratio("chain", "icarus", "conventional"))


RATIOS = _ratios()


def results(starts: Sequence[Seconds]) -> list[dict[str, Any]]:
    """Of all pairs that were measured."""
    return [
        ratio.result([seconds[ratio.measurement] for seconds in starts])
        for ratio in RATIOS
        if {ratio.side, ratio.peer} <= starts[0].get(ratio.measurement, {}).keys()
    ]
