"""What ``icarus bench serve-micro`` is measured against: ratios between sides, and how often a prompt is prefilled.

A ratio is of speeds: the peer's seconds over ours, so more is better for us. Its value is the median over starts of the
engines, in each of which it is that of the medians: two starts of one engine differ by several per cent, and within a
start nothing evens that out. Beside it stand the lowest and the highest ratio of two samples of one round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icarus.bench.micro_plan import ADAPTERS, BATCHES, BLOCK

Seconds = Mapping[str, Mapping[str, Sequence[float]]]
"""Of one start of the engines, by measurement and side; samples in the order of rounds."""


@dataclass(frozen=True)
class Goal:
    """``side`` must be at least ``least`` times as fast as ``peer``; 0 where the ratio is only shown."""

    measurement: str
    side: str
    peer: str
    least: float

    def result(self, starts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
        """As it stands in the report, from the samples of each start by side."""
        sides = [(seconds[self.side], seconds[self.peer]) for seconds in starts]
        # A side may take part in one round only.
        paired = [peer / own for ours, theirs in sides for own, peer in zip(ours, theirs, strict=False)]
        ratios = [statistics.median(theirs) / statistics.median(ours) for ours, theirs in sides]
        value = statistics.median(ratios)
        return {
            "what": f"{self.measurement}: {self.side} over {self.peer}",
            "value": round(value, 3),
            "lowest": round(min(paired), 3),
            "highest": round(max(paired), 3),
            "starts": [round(ratio, 3) for ratio in ratios],
            "at_least": self.least or None,
            "met": value >= self.least if self.least else None,
        }


def _goals() -> tuple[Goal, ...]:
    decodes = [f"decode, batch {batch}" for batch in BATCHES]
    lent = [
        Goal(measurement, f"base model on {system}", "base", least)
        for measurement in (*decodes[:-1], "prefill")
        for system, least in (("stock", 0.0), ("conventional", 0.97), ("icarus", 0.97))
    ]
    return (
        *lent,
        *(Goal(decode, "icarus", "stock", 1.5) for decode in decodes),
        *(Goal(decode, "icarus", "conventional", 0.9) for decode in decodes),
        Goal(decodes[0], "icarus", "base", 0.7),
        *(Goal(decode, "icarus", "base", 0.0) for decode in decodes[1:]),
        Goal("prefill", "icarus", "base", 0.97),
        Goal("prefill", "icarus", "stock", 0.0),
        Goal("prefill", "icarus", "conventional", 0.0),
        Goal("chain", "icarus", "stock", 10.0),
        Goal("chain", "icarus", "conventional", 2.5),
    )


GOALS = _goals()


def results(starts: Sequence[Seconds]) -> list[dict[str, Any]]:
    """Of all goals whose sides were measured."""
    return [
        goal.result([seconds[goal.measurement] for seconds in starts])
        for goal in GOALS
        if {goal.side, goal.peer} <= starts[0].get(goal.measurement, {}).keys()
    ]


def prefilled(answer: Mapping[str, Any]) -> int:
    """Prompt tokens that were computed in a chain, that is, not found in the cache."""
    return sum(turn["prompt_tokens"] - turn["cached_tokens"] for turn in answer["turns"])


def prefilled_once(answers: Sequence[Mapping[str, Any]], prompt: int) -> dict[str, Any]:
    """Whether every whole block of the prompt was computed once; what is behind the last one is computed by each."""
    rest = (prompt - 1) % BLOCK + 1
    worst, most = max(map(prefilled, answers)), prompt + (ADAPTERS - 1) * rest
    return {
        "what": f"chain: prompt tokens that icarus prefills ({prompt} once, and {rest} behind the last shared block "
        "for each further specialist)",
        "value": worst,
        "at_most": most,
        "met": worst <= most,
    }
