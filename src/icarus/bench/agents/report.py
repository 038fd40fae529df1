"""The report of ``icarus bench agents``: medians over repeats, and what ICaRus gains over each peer.

Figures have the names that ``vllm bench serve`` writes (its ``benchmarks/serve.py``). TPOT is (latency - TTFT) /
(output tokens - 1) of a call; ITL is the time between chunks of its stream. A workflow's latency counts from its
arrival to the end of its last call.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np

from icarus.bench.agents.plan import Place
from icarus.bench.agents.records import Run
from icarus.bench.agents.settings import ROOMY, TIGHT

PAPER = {"throughput": {2: 1.4, 4: 2.3, 8: 3.8}, "p95": {2: 3.8, 4: 5.1, 8: 11.1}}
"""arXiv 2603.13281, by the number of models: throughput and P95 latency, times better than conventional models."""

Protocol = Mapping[str, Mapping[str, Any]]
"""What all runs depend on: settings, KV budgets, machine."""


@dataclass(frozen=True)
class Spread:
    """Of a latency, in milliseconds."""

    mean: float
    median: float
    std: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """Of all values, 0 where there is none."""
        values = 1e3 * np.array(seconds or [0.0])
        spread = (values.mean(), np.median(values), values.std(), *np.percentile(values, (50, 95, 99)))
        return cls(*(round(float(value), 2) for value in spread))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one run, or medians over its repeats; throughputs are per second."""

    duration: float
    completed: float
    completed_workflows: float
    total_input_tokens: float
    total_output_tokens: float
    request_throughput: float
    workflow_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft: Spread
    tpot: Spread
    itl: Spread
    e2el: Spread
    workflow: Spread
    prompt_tokens_prefilled: float
    cached_tokens: float
    preemptions: float
    peak_kv_usage: float
    peak_memory_mb: float | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """Of one finished run."""
        calls, seconds = run.calls, run.duration
        prompts, outputs = sum(call.prompt_tokens for call in calls), sum(call.output_tokens for call in calls)
        return cls(
            duration=round(seconds, 3),
            completed=len(calls),
            completed_workflows=len(run.workflows),
            total_input_tokens=prompts,
            total_output_tokens=outputs,
            request_throughput=round(len(calls) / seconds, 4),
            workflow_throughput=round(len(run.workflows) / seconds, 5),
            output_throughput=round(outputs / seconds, 3),
            total_token_throughput=round((prompts + outputs) / seconds, 3),
            ttft=Spread.of([call.ttft for call in calls]),
            tpot=Spread.of([(c.latency - c.ttft) / (c.output_tokens - 1) for c in calls if c.output_tokens > 1]),
            itl=Spread.of([itl for call in calls for itl in call.itls]),
            e2el=Spread.of([call.latency for call in calls]),
            workflow=Spread.of(run.workflows),
            prompt_tokens_prefilled=run.prompt_tokens_prefilled,
            cached_tokens=run.cached_tokens,
            preemptions=run.preemptions,
            peak_kv_usage=max(share for _, share in run.kv_usage),
            peak_memory_mb=run.peak_memory_mb,
        )

    def as_json(self) -> dict[str, float]:
        """Flat, with names as ``p95_ttft_ms``; what is not known is left out."""
        flat: dict[str, float] = {}
        for name, value in vars(self).items():
            if isinstance(value, Spread):
                flat |= {f"{statistic}_{name}_ms": number for statistic, number in vars(value).items()}
            elif value is not None:
                flat[name] = value
        return flat


Kind = TypeVar("Kind", Figures, Spread)


def medians(each: Sequence[Kind]) -> Kind:
    """The median of every figure; unknown where it is unknown in one of them."""
    values: dict[str, Any] = {}
    for entry in fields(each[0]):
        column = [getattr(one, entry.name) for one in each]
        if isinstance(column[0], Spread):
            values[entry.name] = medians(column)
        else:
            values[entry.name] = None if None in column else statistics.median(column)
    return type(each[0])(**values)


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
        measured: dict[Place, dict[int, Figures]] = {}  # by place and repeat
        for run in runs:
            measured.setdefault(run.unit.place, {})[run.unit.repeat] = Figures.of(run)
        ours = [place for place in measured if place.system == "icarus"]
        gains = [gain for place in ours for gain in _gains(measured, place)]
        return cls(
            by_models=_by_models(gains, protocol["settings"]["workloads"][0]),
            gains=gains,
            rows=[Row(place=p, repeats=len(each), figures=medians([*each.values()])) for p, each in measured.items()],
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
            "by_models": [*map(asdict, self.by_models)],
            "gains": [*map(asdict, self.gains)],
            "runs": [row.as_json() for row in self.rows],
            "failures": self.failures,
            "commits": self.commits,
            "protocol": self.protocol,
        }


def _gains(measured: Mapping[Place, Mapping[int, Figures]], place: Place) -> Iterator[Gain]:
    """ICaRus in one place against every peer there; ``base`` has one model whatever N is.

    Repeats have texts and arrivals of their own, so only those that both have are compared.
    """
    for peer in measured:
        same_models = peer.system == "base" or peer.models == place.models
        both = measured[place].keys() & measured[peer].keys()
        if peer.system == "icarus" or not same_models or peer.load != place.load or not both:
            continue
        ours, theirs = (medians([measured[here][repeat] for repeat in both]) for here in (place, peer))
        yield Gain(
            models=place.models,
            budget=place.budget,
            workload=place.workload,
            rate=place.rate,
            over=peer.system,
            throughput=round(ours.workflow_throughput / theirs.workflow_throughput, 3),
            p95=round(theirs.workflow.p95 / ours.workflow.p95, 3),
            p50=round(theirs.workflow.p50 / ours.workflow.p50, 3),
            prefilled=round(theirs.prompt_tokens_prefilled / max(ours.prompt_tokens_prefilled, 1), 3),
        )


def _by_models(gains: Sequence[Gain], swept: str) -> list[Speedup]:
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
