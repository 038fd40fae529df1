"""From the results to what people look at: tables, curves, and scores with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.accuracy import work
from experiments.accuracy.plan import Cell, best_rate
from icarus import arguments, atomic
from icarus.context import BASE
from icarus.evaluate import Outcome
from icarus.evaluate.report import shown, summary

PEER, PLAIN = "conventional", "icarus"
"""The arms that the others are compared with."""


def run(place: work.Place) -> None:
    """Write ``summary.json``, ``summary.md`` and the plots beside the results."""
    report: dict[str, Any] = {}
    tasks = dict.fromkeys(task for task, _ in place.settings.pairs)
    for task in tasks:
        report[task] = _task(place, task)
        if seen := work.parts(place, task).seen:
            report[f"{task}, unseen functions"] = _task(place, task, seen)
        if place.settings.curves(task) and any(place.results.glob(f"{task}.*.json")):
            _plot_curves(place, task)
    arguments.write_json({"tasks": report}, str(place.results / "summary.json"))
    tables = [_table(task, arms, place.settings.seeds) for task, arms in report.items()]
    parts = [_LEGEND, *tables, _wins({task: report[task] for task in tasks})]
    atomic.write_text(place.results / "summary.md", "\n\n".join(parts) + "\n")
    _plot_scores(report, place.results / "scores.png")


def _task(place: work.Place, task: str, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Of each arm: its search, its runs at the best rate, and how these compare with the peer's of the same seed.

    Scores, losses and differences leave out the items named in ``without``.
    """
    arms = [arm for name, arm in place.settings.pairs if name == task]
    report: dict[str, Any] = {BASE: {"seeds": _seeds(place, Cell(task, BASE, 0.0, 0), without)}}
    for arm in arms:
        rate = best_rate(place.settings, task, arm, place.loss)
        report[arm] = {"search": _search(place, task, arm), "rate": rate, "seeds": {}}
        if rate is not None:
            report[arm]["seeds"] = _seeds(place, Cell(task, arm, rate, 0), without)
    return report


def _search(place: work.Place, task: str, arm: str) -> dict[str, float]:
    """Validation loss by rate, of the first seed."""
    seed = place.settings.seeds[0]
    names = [file.name.removesuffix(f".{seed}.json") for file in place.results.glob(f"{task}.{arm}.*.{seed}.json")]
    rates = sorted(float(name.removeprefix(f"{task}.{arm}.")) for name in names)
    losses = {rate: place.loss(Cell(task, arm, rate, seed)) for rate in rates}
    return {f"{rate:g}": round(loss, 4) for rate, loss in losses.items() if loss is not None}


def _seeds(place: work.Place, first: Cell, without: frozenset[str]) -> dict[str, Any]:
    """By seed: cost, loss and score on held-back items, and differences to the run of the peer with that seed."""
    task, arm, found = first.task, first.arm, dict[str, Any]()
    for seed in place.settings.seeds if arm != BASE else (0,):
        cell = replace(first, seed=seed)
        figures = _training(place, cell) if arm != BASE else {}
        if own := _outcomes(place, cell, without):
            peer, plain = (_of_arm(place, task, name, seed, without) for name in (PEER, PLAIN))
            figures |= _compared(task, arm, own, PEER, peer)
            if plain and arm not in (BASE, PEER, PLAIN):
                figures[f"over {PLAIN}"] = _compared(task, arm, own, PLAIN, plain)["difference"]
        if figures:
            found[str(seed)] = figures
    return found


def _of_arm(place: work.Place, task: str, arm: str, seed: int, without: frozenset[str]) -> list[Outcome]:
    """The outcomes at its best rate."""
    rate = best_rate(place.settings, task, arm, place.loss)
    return [] if rate is None else _outcomes(place, Cell(task, arm, rate, seed), without)


def _compared(task: str, arm: str, own: list[Outcome], other: str, its: list[Outcome]) -> dict[str, Any]:
    if arm == other or not its:
        figures: dict[str, Any] = summary(own, {arm: arm}, arm)[task][arm]
    else:
        figures = summary([*own, *its], {arm: arm, other: other}, other)[task][arm]
    return figures


def _training(place: work.Place, cell: Cell) -> dict[str, Any]:
    if place.loss(cell) is None:
        return {}
    result = work.read(place.result(cell)) or {}
    names = ("validation_loss", "trainable", "tokens", "seconds", "cpu_seconds", "peak_bytes")
    on = result["machine"].get("gpu", "CPU")
    return {name: result[name] for name in names if name in result} | {"on": on}


def _outcomes(place: work.Place, cell: Cell, without: frozenset[str]) -> list[Outcome]:
    """The items of a run but for some; the text of answers is not kept."""
    scores = work.scores(place, cell)
    if scores is None:
        return []
    columns = {name: text.split(" ") for name, text in scores["items"].items()}
    return [
        Outcome(
            task=cell.task,
            side=cell.arm,
            item=item,
            score=float(score),
            loss=float(loss),
            tokens=int(tokens),
            text="",
            generated_tokens=int(generated),
            drift=None if drift == "-" else float(drift),
        )
        for item, score, loss, tokens, generated, drift in zip(
            *(columns[name] for name in ("item", "score", "loss", "tokens", "generated", "drift")), strict=True
        )
        if item not in without
    ]


# ------------------------------------------------------------------------------------------------ tables


_LEGEND = """\
One figure for each seed. Differences are over conventional LoRA of the same seed, with their 95 % interval. *Tokens*
are those of all rows trained on, in thousands; *minutes* are those of the processor, of the last start where a run was
resumed; *memory* is the peak of the process in GB, which may have prepared the team's base model before. Runs that
shared a GPU or a machine took longer than alone."""


def _table(task: str, arms: Mapping[str, Any], wanted: Sequence[int]) -> str:
    """A table in Markdown: a row for each arm, with all seeds' figures in each cell."""
    over = f"over {PEER}"
    heads = ["arm", "trainable, M", "rate", "validation loss", "test loss", over, "score", over, "drift"]
    heads += ["tokens", "minutes", "memory", "on"]
    lines = [f"### {task}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, own in arms.items():
        seeds = list(own["seeds"].values())
        cells = [arm, *_cells(own, seeds)]
        if arm != BASE:
            cells[3] = _both([cells[3], *_missing(own, wanted)])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _missing(own: Mapping[str, Any], wanted: Sequence[int]) -> list[str]:
    """What is still to be run of an arm, in words."""
    if not own["seeds"]:
        tried = ", ".join(f"{rate}: {loss}" for rate, loss in own.get("search", {}).items())
        return [f"search: {tried}" if tried else "not run"]
    return [f"seed {seed} not run" for seed in wanted if str(seed) not in own["seeds"]]


def _unscored(own: Mapping[str, Any]) -> list[str]:
    """Seeds whose answers are not scored, where those of others are."""
    scored = [seed for seed, figures in own["seeds"].items() if "score" in figures]
    return [f"seed {seed} not scored" for seed in own["seeds"] if scored and seed not in scored]


def _cells(own: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    differences = [seed.get("difference", {}) for seed in seeds]

    def each(name: str, form: str, scale: float = 1) -> str:
        return _both(f"{scale * seed[name]:{form}}" for seed in seeds if name in seed)

    return [
        next((f"{seed['trainable'] / 1e6:.2f}" for seed in seeds if "trainable" in seed), ""),
        f"{own['rate']:g}" if own.get("rate") else "",
        each("validation_loss", ".3f"),
        each("loss", ".3f"),
        _both(shown(difference.get("loss"), 1, ".3f") for difference in differences),
        _both([each("score", ".1f", 100), *_unscored(own)]),
        _both(shown(difference.get("score"), 100, ".1f") for difference in differences),
        each("drift", ".2f"),
        each("tokens", ".0f", 1e-3),
        each("cpu_seconds", ".1f", 1 / 60),
        each("peak_bytes", ".1f", 1e-9),
        _both(dict.fromkeys(seed["on"] for seed in seeds if "on" in seed)),
    ]


def _wins(report: Mapping[str, Any]) -> str:
    """Where an arm is clearly better or worse than another: the interval is on one side of 0 for each of two seeds."""
    arms = dict.fromkeys(arm for own in report.values() for arm in own if arm != BASE)
    lines = [
        "### Who wins",
        "",
        "An arm wins over another if intervals exclude 0 with both seeds on at least two tasks.",
        "",
        "| arm | over | by | better on | worse on | so it |",
        "|---|---|---|---|---|---|",
    ]
    for arm in arms:
        for other, key in ((PEER, "difference"), (PLAIN, f"over {PLAIN}")):
            for name, sign in (("score", 1), ("loss", -1)):
                better, worse = (_clear(report, arm, key, name, side) for side in (sign, -sign))
                if arm != other and (better or worse):
                    so = "wins" if len(better) > 1 else "loses" if len(worse) > 1 else ""
                    lines.append(f"| {arm} | {other} | {name} | {', '.join(better)} | {', '.join(worse)} | {so} |")
    return "\n".join(lines)


def _clear(report: Mapping[str, Any], arm: str, key: str, name: str, sign: int) -> list[str]:
    """The tasks on which the differences of two seeds have this sign, intervals included."""
    found = []
    for task, arms in report.items():
        seeds = arms.get(arm, {"seeds": {}})["seeds"].values()
        intervals = [seed[key][name]["interval"] for seed in seeds if key in seed]
        if len(seeds) == len(intervals) > 1 and all(
            own and min(sign * bound for bound in own) > 0 for own in intervals
        ):
            found.append(task)
    return found


def _both(texts: Iterable[str]) -> str:
    return "; ".join(text for text in texts if text)


# ------------------------------------------------------------------------------------------------- plots


def _plot_curves(place: work.Place, task: str) -> None:
    """Validation loss over tokens seen and over wall time, of each arm at its best rate so far."""
    arms = [arm for name, arm in place.settings.pairs if name == task]
    timed = any(work.step_ms(place, task, place.settings.arms[arm]) for arm in arms)
    count = 2 if timed else 1
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 4), sharey=True, squeeze=False)
    for arm in arms:
        if place.settings.arms[arm].method == "distill":  # its loss in training holds the divergence, too
            continue
        searched = _search(place, task, arm)
        if not searched:
            continue
        rate = min(searched, key=lambda name: searched[name])
        result = work.read(place.result(Cell(task, arm, float(rate), place.settings.seeds[0])))
        if not result or not result["validation"]:
            continue
        steps, losses = zip(*result["validation"], strict=True)
        tokens = [step * result["tokens"] / result["steps"] / 1e3 for step in steps]
        (line,) = axes[0, 0].plot(tokens, losses, "o-", label=f"{arm}, {rate}")
        if step_ms := work.step_ms(place, task, place.settings.arms[arm]):
            axes[0, 1].plot([step * step_ms / 1e3 for step in steps], losses, "o-", color=line.get_color())
    if not axes[0, 0].lines:  # its runs looked at no validation rows on the way
        plt.close(figure)
        return
    axes[0, 0].set(xlabel="thousand tokens seen", ylabel="validation loss (nats per token)", title=task)
    if timed:
        axes[0, 1].set(xlabel="seconds, from alternating step times", title="the same over wall time")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(place.results / f"{task}.png", dpi=120)
    plt.close(figure)


def _plot_scores(report: Mapping[str, Any], file: Path) -> None:
    """Differences to the peer with their intervals, each seed in its colour: scores in points, losses in nats."""
    rows = {
        f"{task}: {arm}": [seed["difference"] for seed in own["seeds"].values() if "difference" in seed]
        for task, arms in report.items()
        for arm, own in arms.items()
        if arm != BASE
    }
    rows = {name: seeds for name, seeds in rows.items() if seeds}
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.3 * len(rows)), sharey=True)
    for axis, name, scale, label in zip(axes, ("score", "loss"), (100, 1), ("points", "nats per token"), strict=True):
        for place, seeds in enumerate(rows.values()):
            for seed, difference in enumerate(seeds):
                low, high = (scale * bound for bound in difference[name]["interval"])
                height, colour = place + 0.3 * (seed - (len(seeds) - 1) / 2), f"C{seed}"
                axis.plot([low, high], [height, height], color=colour, label=f"seed {seed}")
                axis.plot(scale * difference[name]["value"], height, "o", color=colour, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel=label, title=f"{name} over {PEER}")
        axis.grid(alpha=0.3, axis="x")
    lines, seeds_drawn = axes[1].get_legend_handles_labels()
    by_seed = dict(zip(seeds_drawn, lines, strict=True))
    axes[1].legend(by_seed.values(), by_seed, fontsize=8, title="95 % interval", loc="lower right")
    axes[0].set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first row at the top
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
