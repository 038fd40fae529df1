"""The report of ``icarus bench agents``: medians over repeats, and what ICaRus gains over each peer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from icarus.bench.agents.figures import Figures, medians
from icarus.bench.agents.plan import Place
from icarus.bench.agents.records import Run
from icarus.bench.agents.settings import ROOMY, TIGHT

PAPER = {"throughput": {2: 1.4, 4: 2.3, 8: 3.8}, "p95": {2: 3.8, 4: 5.1, 8: 11.1}}
"""arXiv 2603.13281, by the number of models: throughput and P95 latency, times better than conventional models."""

Protocol = Mapping[str, Mapping[str, Any]]
"""What all runs depend on: settings, KV budgets, machine."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One place, with the median of every figure over its repeats."""

    place: Place
    repeats: int
    figures: Figures

    def as_json(self) -> dict[str, Any]:
        """Flat."""
        return {**asdict(self.place), "repeats": self.repeats, **self.figures.as_json()}


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How many times better ICaRus is than a peer in one place: more a second, less latency, fewer tokens prefilled."""

    models: int
    budget: str
    workload: str
    rate: float | None
    over: str
    throughput: float
    p95: float
    p50: float
    prefilled: float


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """Over conventional models on the swept workload: throughput all at once, and the largest gap of P95 at a rate."""

    budget: str
    models: int
    throughput: float | None
    p95: float | None
    p95_at_rate: float | None
    p95_all_at_once: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a command measured."""

    by_models: Sequence[Speedup]
    gains: Sequence[Gain]
    rows: Sequence[Row]
    failures: Sequence[str]
    commits: Sequence[str]  # one, or it is a mixture
    protocol: Protocol

    @classmethod
    def of(cls, protocol: Protocol, runs: Sequence[Run], failures: Sequence[str] = ()) -> Self:
        """From the finished runs."""
        rows = rows_of(runs)
        gains = [gain for row in rows if row.place.system == "icarus" for gain in _gains(runs, rows, row.place)]
        return cls(
            by_models=by_models(gains, protocol["settings"]["workloads"][0]),
            gains=gains,
            rows=rows,
            failures=list(failures),
            commits=sorted({run.commit for run in runs if run.commit}),
            protocol=protocol,
        )

    @property
    def headline(self) -> Speedup | None:
        """With the most models, in the tight budget if that was measured."""
        tight = [speedup for speedup in self.by_models if speedup.budget == TIGHT] or self.by_models
        return max(tight, key=lambda speedup: speedup.models, default=None)

    def as_json(self) -> dict[str, Any]:
        """For ``report.json``."""
        best = self.headline
        return {
            "speedup": {key: getattr(best, key, None) for key in ("throughput", "p95")},
            "by_models": [asdict(speedup) for speedup in self.by_models],
            "gains": [asdict(gain) for gain in self.gains],
            "runs": [row.as_json() for row in self.rows],
            "failures": list(self.failures),
            "commits": list(self.commits),
            "protocol": dict(self.protocol),
        }


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """A row for each place, in the order in which they were measured first."""
    groups: dict[Place, list[Figures]] = {}
    for run in runs:
        groups.setdefault(run.unit.place, []).append(Figures.of(run))
    return [Row(place=place, repeats=len(each), figures=medians(each)) for place, each in groups.items()]


def _gains(runs: Sequence[Run], rows: Sequence[Row], place: Place) -> Iterator[Gain]:
    """ICaRus in one place against every peer there; ``base`` has one model whatever N is.

    Repeats have texts and arrivals of their own, so only those that both have are compared.
    """
    for peer in (row.place for row in rows if row.place.system != "icarus"):
        if (peer.budget, peer.workload, peer.rate) != (place.budget, place.workload, place.rate):
            continue
        if peer.models != place.models and peer.system != "base":
            continue
        at_ours, at_peer = ({run.unit.repeat: run for run in runs if run.unit.place == here} for here in (place, peer))
        both = at_ours.keys() & at_peer.keys()
        if both:
            ours, theirs = (medians([Figures.of(by[repeat]) for repeat in both]) for by in (at_ours, at_peer))
            yield _gain(place, ours, peer.system, theirs)


def _gain(place: Place, ours: Figures, over: str, theirs: Figures) -> Gain:
    return Gain(
        models=place.models,
        budget=place.budget,
        workload=place.workload,
        rate=place.rate,
        over=over,
        throughput=round(ours.workflow_throughput / theirs.workflow_throughput, 3),
        p95=round(theirs.workflow.p95 / ours.workflow.p95, 3),
        p50=round(theirs.workflow.p50 / ours.workflow.p50, 3),
        prefilled=round(theirs.prompt_tokens_prefilled / max(ours.prompt_tokens_prefilled, 1), 3),
    )


def by_models(gains: Sequence[Gain], swept: str) -> list[Speedup]:
    """For each budget and number of models."""
    peers = [gain for gain in gains if gain.over == "conventional" and gain.workload == swept]
    places = {(gain.budget, gain.models) for gain in peers}
    speedups = []
    for budget, models in sorted(places, key=lambda place: (place[0] == ROOMY, place)):
        here = [gain for gain in peers if (gain.budget, gain.models) == (budget, models)]
        at_once = next((gain for gain in here if gain.rate is None), None)
        rated = max((gain for gain in here if gain.rate is not None), key=lambda gain: gain.p95, default=None)
        speedups.append(
            Speedup(
                budget=budget,
                models=models,
                throughput=at_once.throughput if at_once else None,
                p95=rated.p95 if rated else None,
                p95_at_rate=rated.rate if rated else None,
                p95_all_at_once=at_once.p95 if at_once else None,
            )
        )
    return speedups
