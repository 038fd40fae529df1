"""The figures that pages quote, written into them from ``results/``, so that a figure stands in one place only.

    python -m benchmarks.figures            # or: make figures

A page has a table between two comments, and this script writes what is between them:

    <!-- figures: headline -->
    <!-- end of figures -->

The names are those of ``TABLES``. ``tests/benchmarks/test_figures.py`` fails where a page and the results disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from icarus.bench.agents.report import PAPER
from icarus.evaluate.report import shown

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "src" / "icarus" / "shipped"

SCORED = ("packaged model", "packaged model, three examples", "prepared base", "specialist")
"""Whom ``results/specialists.json`` compares."""

Table = list[list[str]]
"""Rows of cells; the first row is the head."""


class BadPage(Exception):
    """A page asks for a table that there is none of, or does not say where it ends."""


# ----------------------------------------------------------------------------------------- results


@cache
def result(name: str) -> Any:
    """A report by its path in ``results/``, without ``.json``."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def decode_ms(batch: int, side: str) -> float:
    """Milliseconds of a decode step in process."""
    return float(result("bench-decode")["batches"][str(batch)]["steps"][side]["median_ms"])


def training(side: str, loss_on: str = "completion") -> Mapping[str, float]:
    """``median_ms`` and ``peak_bytes`` of a training step."""
    step: Mapping[str, float] = result("bench-train")[f"loss_on_{loss_on}"]["steps"][side]
    return step


def served(measurement: str, side: str) -> float:
    """The median of ``serve_micro``, in the measurement's unit."""
    return float(result("serve-micro")["measurements"][measurement]["sides"][side]["median"])


def ratio(measurement: str, side: str, peer: str) -> float:
    """How many times as fast ``side`` is in ``serve_micro``: the median over starts of the engines."""
    what = f"{measurement}: {side} over {peer}"
    return next(float(entry["value"]) for entry in result("serve-micro")["ratios"] if entry["what"] == what)


def agents(system: str, models: int, *, rate: float | None = None, budget: str = "tight") -> Mapping[str, float]:
    """Figures of ReAct workflows on one served system."""
    place = {"system": system, "models": models, "rate": rate, "budget": budget, "workload": "react"}
    runs = [run for run in result("agents/report")["runs"] if all(run[key] == value for key, value in place.items())]
    (run,) = runs
    figures: Mapping[str, float] = run
    return figures


def gain(models: int, over: str, rate: float | None = None) -> Mapping[str, float]:
    """What ICaRus gains in ReAct workflows with the tight budget."""
    place = {"models": models, "over": over, "rate": rate, "budget": "tight", "workload": "react"}
    gains = [row for row in result("agents/report")["gains"] if all(row[key] == value for key, value in place.items())]
    (row,) = gains
    figures: Mapping[str, float] = row
    return figures


def minute(run: Mapping[str, float]) -> str:
    """Workflows a minute."""
    return f"{60 * run['workflow_throughput']:.1f}"


def p95(run: Mapping[str, float]) -> str:
    """P95 latency of a workflow, three digits of it."""
    seconds = run["p95_workflow_ms"] / 1e3
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.1f} s"


# ----------------------------------------------------------------------------------------- tables


def headline() -> Table:
    """Six figures for the front page, two of which are losses."""
    demo = result("demo")
    step, usual = training("icarus"), training("conventional")
    kv = {side: demo[side]["kv_bytes"] for side in ("conventional", "icarus")}
    batch = "decode, batch 16"
    return [
        ["", "conventional LoRA", "ICaRus", ""],
        [
            "[Served agents](docs/benchmark.md#results): ReAct workflows a minute, 8 models, KV room for one cache",
            minute(agents("conventional", 8)),
            f"**{minute(agents('icarus', 8))}**",
            f"{gain(8, 'conventional')['throughput']:.1f}x",
        ],
        [
            "[The same](docs/benchmark.md#results), workflows arriving for two minutes: P95 latency",
            p95(agents("conventional", 8, rate=0.2)),
            f"**{p95(agents('icarus', 8, rate=0.2))}**",
            f"{gain(8, 'conventional', 0.2)['p95']:.1f}x lower",
        ],
        [
            f"[KV cache](results/README.md#in-process) after {len(demo['turns'])} turns of 3 specialists",
            f"{kv['conventional'] / 1e6:.1f} MB",
            f"**{kv['icarus'] / 1e6:.1f} MB**",
            f"{kv['conventional'] / kv['icarus']:.1f}x less",
        ],
        [
            "[Training step](results/README.md#in-process), loss on 96 of 864 tokens",
            f"{usual['median_ms'] / 1e3:.2f} s",
            f"**{step['median_ms'] / 1e3:.2f} s**",
            f"{usual['median_ms'] / step['median_ms']:.1f}x faster",
        ],
        [
            "[Accuracy](docs/accuracy.md): SQL queries right after equal time of training on a CPU; prepared base",
            f"**{_right('conventional')}**",
            _right("team-time"),
            f"**we lose**; {_right('icarus')} at equal steps on the base as it is",
        ],
        [
            "[Decoding 16 requests at once](results/README.md#served), tokens a second",
            f"**{served(batch, 'conventional'):.0f}**",
            f"{served(batch, 'icarus'):.0f}",
            f"**{ratio(batch, 'icarus', 'conventional'):.2f}x: we lose**",
        ],
    ]


def in_process() -> Table:
    """Decode and training steps and the demo, beside conventional LoRA in one run."""
    rows = [["", "conventional LoRA", "ICaRus", ""]]
    for batch, context in ((1, ", context 256"), (8, "")):
        usual, ours = decode_ms(batch, "conventional"), decode_ms(batch, "icarus")
        rows.append(
            [f"decode step, batch {batch}{context}", f"{usual:.1f} ms", f"{ours:.1f} ms", _lost(ours / usual, "x")]
        )
    usual_step, step = training("conventional"), training("icarus")
    rows.append(
        [
            "training step, loss on 96 of 864 tokens, batch 2",
            f"{usual_step['median_ms'] / 1e3:.2f} s",
            f"{step['median_ms'] / 1e3:.2f} s",
            f"{usual_step['median_ms'] / step['median_ms']:.1f}x faster",
        ]
    )
    rows.append(
        [
            "its memory above the model",
            f"{usual_step['peak_bytes'] / 1e9:.2f} GB",
            f"{step['peak_bytes'] / 1e9:.2f} GB",
            f"{usual_step['peak_bytes'] / step['peak_bytes']:.1f}x less",
        ]
    )
    usual_step, step = training("conventional", "all_tokens"), training("icarus", "all_tokens")
    rows.append(
        [
            "training step, loss on all tokens",
            f"{usual_step['median_ms'] / 1e3:.2f} s",
            f"{step['median_ms'] / 1e3:.2f} s",
            _lost(step["median_ms"] / usual_step["median_ms"], "x"),
        ]
    )
    return [*rows, _demo()]


def _demo() -> list[str]:
    demo = result("demo")
    usual, ours = demo["conventional"], demo["icarus"]
    keys = ("seconds", "prefilled_tokens", "kv_bytes")
    cells = [
        f"{side['seconds']:.2f} s, {side['prefilled_tokens']:,} prompt tokens, {side['kv_bytes'] / 1e6:.1f} MB KV"
        for side in (usual, ours)
    ]
    gains = ", ".join(f"{usual[key] / ours[key]:.1f}x" for key in keys)
    return [f"{len(demo['turns'])} turns of 3 specialists in one context (`icarus demo`)", *cells, gains]


def _lost(ratio: float, unit: str) -> str:
    """Time over the peer's; more than 1 is a loss."""
    text = f"{ratio:.2f}{unit}"
    return f"**{text}: we lose**" if ratio > 1 else text


def serve_micro() -> Table:
    """Engines of vLLM side by side."""
    systems = ("base", "stock", "conventional", "icarus")
    rows = [["", "base model", "stock multi-LoRA", "conventional, our CPU operator", "ICaRus"]]
    for batch in (1, 8, 16):
        what = f"decode, batch {batch}" + (", tokens/s" if batch == 1 else "")
        rows.append([what, *(f"{served(f'decode, batch {batch}', system):.1f}" for system in systems)])
    rows.append(["prefill, 1,000 tokens, tokens/s", *(f"{served('prefill', system):,.0f}" for system in systems)])
    lent = [f"base model on {system}" for system in systems[1:]]
    both = [" / ".join(f"{served(f'decode, batch {batch}', side):.1f}" for batch in (1, 8)) for side in lent]
    rows.append(["base-model requests on that engine: decode, batch 1 / 8", "", *both])
    prefills = (f"{served('prefill', side):,.0f}" for side in lent)
    rows.append(["base-model requests on that engine: prefill", "", *prefills])
    chain = result("serve-micro")["measurements"]["chain"]["sides"]
    seconds = [f"{served('chain', system):.1f} s" for system in systems[1:]]
    rows.append(["8 specialists in turn about 1,000 tokens, 16 tokens each", "", *seconds[:-1], f"**{seconds[-1]}**"])
    rows.append(
        ["prompt tokens prefilled for it", "", *(f"{chain[system]['prefilled_tokens']:,}" for system in systems[1:])]
    )
    return rows


def agent_workflows() -> Table:
    """What is served a minute, how long a workflow takes, and what is prefilled."""
    systems = (("conventional", 8), ("icarus", 8), ("base", 1))
    usual, ours, base = (agents(system, models) for system, models in systems)
    rated = [p95(agents(system, models, rate=0.2)) for system, models in systems]
    rows = [
        ["", "conventional, our operators", "ICaRus", "one base model in all roles (upper bound)"],
        ["8 models: workflows a minute, all at once", minute(usual), _times(8, ours), minute(base)],
        [
            "P95 of a workflow, 0.2 a second arriving for two minutes",
            rated[0],
            f"**{rated[1]}** ({gain(8, 'conventional', 0.2)['p95']:.1f}x)",
            rated[2],
        ],
        [
            "prompt tokens prefilled, all at once",
            *(f"{run['prompt_tokens_prefilled']:,.0f}" for run in (usual, ours, base)),
        ],
    ]
    for models in (4, 2, 1):
        each = agents("conventional", models), agents("icarus", models)
        count = "1 model" if models == 1 else f"{models} models"
        rows.append([f"{count}: workflows a minute", minute(each[0]), _times(models, each[1]), minute(base)])
    usual, ours = (agents(system, 8, budget="roomy") for system in ("conventional", "icarus"))
    (roomy,) = [row for row in result("agents/report")["by_models"] if row["budget"] == "roomy"]
    rows.append(
        [
            "8 models, room for all caches: workflows a minute",
            minute(usual),
            f"**{minute(ours)}** ({roomy['throughput']:.1f}x)",
            "",
        ]
    )
    return rows


def _times(models: int, run: Mapping[str, float]) -> str:
    times = gain(models, "conventional")["throughput"]
    return f"**{minute(run)}** ({times:.1f}x)" if times > 1.05 else f"{minute(run)} ({times:.2f}x)"


def agent_gains() -> Table:
    """ICaRus over conventional models, with the paper's figures in brackets."""
    rows = [
        [
            "models",
            "throughput, all at once",
            "P95 of a workflow, 0.2 arriving a second",
            "the same, 0.05 a second",
            "throughput over one base model in all roles",
        ]
    ]
    for models in (8, 4, 2, 1):
        at_once, fast, slow = (gain(models, "conventional", rate) for rate in (None, 0.2, 0.05))
        paper = {key: f" ({by_models[models]:g})" if models in by_models else "" for key, by_models in PAPER.items()}
        best = f"{fast['p95']:.1f}{paper['p95']}"
        throughput = f"{at_once['throughput']:.2f}{paper['throughput']}"
        over_base = gain(models, "base")["throughput"]
        rows.append(
            [
                str(models),
                throughput,
                f"**{best}**" if models > 1 else best,
                f"{slow['p95']:.1f}",
                f"{over_base:.2f}",
            ]
        )
    return rows


def specialists() -> Table:
    """The shipped specialists on unseen tables."""
    rows = [
        ["", "task", "measure", "packaged model", "with three examples in the prompt", "prepared base", "specialist"]
    ]
    for name, scored in shipped().items():
        sides = (scored[side] for side in SCORED)
        measure = f"{scored['measure']}, {scored['rows']} rows"
        rows.append([f"`{name}`", scored["task"], measure, *(f"{side:.1%}".replace("%", " %") for side in sides)])
    return rows


def specialist(name: str) -> Table:
    """One of them, for its card."""
    head, *rows = specialists()
    return [head, *(row for row in rows if row[0] == f"`{name}`")]


def soak() -> Table:
    """What was asked under random load, summed over the runs, and what was wrong with the answers."""
    kinds = {"tiny model, in engines": "load", "packaged model, `icarus serve`": "real"}
    runs = {
        title: [result(f"soak/{file.stem}") for file in sorted((ROOT / "results" / "soak").glob(f"{kind}-*.json"))]
        for title, kind in kinds.items()
    }
    runs = {title: each for title, each in runs.items() if each}
    rows = [["", *runs]]

    def add(what: str, part: str, *names: str) -> None:
        sums = [[sum(run[part].get(name, 0) for run in each) for name in names] for each in runs.values()]
        rows.append([what, *(" / ".join(f"{count:,}" for count in counts) for counts in sums)])

    add("requests", "counts", "requests")
    add("of the base model / specialists / conventional adapters", "counts", "base", "icarus", "conventional")
    add("streamed / with scores of the prompt / behind another's answer", "counts", "streamed", "scored", "following")
    add("cancelled", "counts", "cancelled")
    add("preemptions", "counts", "preemptions")
    add("swaps / loads of the same weights / unloads", "counts", "swaps", "reloads", "renewals")
    add("requests whose adapter was replaced while they were open", "counts", "swapped_while_open")
    add("tokens / scores compared", "judged", "tokens", "scores")
    add("tokens that differ where the two best logits lie within 1e-4", "judged", "ties")
    wrong = (sum(run["faults"] for run in each) for each in runs.values())
    rows.append(["**wrong tokens, wrong scores, lost requests**", *(f"**{count}**" for count in wrong)])
    return rows


def accuracy(model: str) -> Table:
    """Specialists beside conventional LoRA of the same seeds on the tasks that were run; each cell is a mean."""
    rows = [["task", "arm", "trainable", "rate", "loss", "over conventional", "right", "over conventional"]]
    for task, arms in result(f"accuracy/{model}/summary")["tasks"].items():
        for arm, own in arms.items():
            seeds = _seeds(own)
            scored = [seed for seed, run in own["seeds"].items() if "score" in run]
            peer = _seeds(arms["conventional"], None if arm == "base" else scored)
            if not seeds or not peer:
                continue
            loss, right = (_mean(seeds, name) for name in ("loss", "score"))
            usual, usual_right = (_mean(peer, name) for name in ("loss", "score"))
            itself = arm == "conventional"
            rows.append(
                [
                    task,
                    arm + ("" if len(seeds) > 1 or arm == "base" else " (one seed)"),
                    f"{seeds[0]['trainable'] / 1e6:.2f} M" if "trainable" in seeds[0] else "",
                    f"{own['rate']:g}" if own.get("rate") else "",
                    f"{loss:.3f}",
                    "" if itself else f"{loss / usual - 1:+.0%}".replace("%", " %"),
                    f"{right:.1%}".replace("%", " %"),
                    "" if itself else f"{100 * (right - usual_right):+.1f} points",
                ]
            )
    return rows


def accuracy_forms() -> Table:
    """Validation losses by rate of what else was tried, the best first."""
    arms = result("accuracy/forms/summary")["tasks"]["commonsenseqa"]
    found = {arm: own for arm, own in arms.items() if own.get("search")}
    rates = sorted({rate for own in found.values() for rate in own["search"]}, key=float)
    plain = min(found["icarus"]["search"].values())
    rows = [["arm", "trainable", *rates, "over plain ICaRus"]]
    for arm, own in sorted(found.items(), key=lambda pair: min(pair[1]["search"].values())):
        best = min(own["search"].values())
        losses = (own["search"].get(rate) for rate in rates)
        rows.append(
            [
                arm,
                f"{own['seeds']['0']['trainable'] / 1e6:.2f} M" if own["rate"] else "search not finished",
                *("" if loss is None else f"**{loss:.3f}**" if loss == best else f"{loss:.3f}" for loss in losses),
                "" if arm == "icarus" else f"{best / plain - 1:+.1%}".replace("%", " %"),
            ]
        )
    return rows


_CHAIN = {  # label, scale, format, unit
    "plan": ("plan right", 100, ".1f", " %"),
    "sql": ("SQL right at the end", 100, ".1f", " %"),
    "sql if plan": ("the same, where the plan was right", 100, ".1f", " %"),
    "explanation": ("explanation, token F1 with a person's question", 1, ".3f", ""),
}


def chain() -> Table:
    """Three specialists that continue one another, beside conventional ones on the same tables."""
    report = result("chain")
    rows = [["", "conventional", "ICaRus", "difference", "ICaRus, prepared base", "difference"]]
    for name, (label, scale, form, unit) in _CHAIN.items():
        cells = [f"{scale * report['lora'][name]['value']:{form}}{unit}"]
        for side in ("icarus", "team"):
            cells.append(f"{scale * report[side][name]['value']:{form}}{unit}")
            cells.append(shown(report[f"{side} - lora"][name], scale, form))
        rows.append([label, *cells])
    read = report["tokens read for a chain"]
    lora, icarus, team = (f"{read[side]:.0f}" for side in ("lora", "icarus", "team"))
    rows.append(["tokens read for a chain", lora, icarus, "", team, ""])
    return rows


def chain_shipped() -> Table:
    """The shipped specialists, end to end on the same tables."""
    report = result("chain-shipped")
    rows = [["", "shipped specialists", "95 % interval", "tables"]]
    for name, (label, scale, form, unit) in _CHAIN.items():
        own = report["shipped"][name]
        low, high = (f"{scale * bound:{form}}" for bound in own["interval"])
        rows.append([label, f"{scale * own['value']:{form}}{unit}", f"{low} to {high}", str(own["tables"])])
    return rows


def _right(arm: str) -> str:
    """Share of right answers on WikiSQL, the mean of all seeds."""
    seeds = _seeds(result("accuracy/smollm2/summary")["tasks"]["wikisql"][arm])
    return f"{_mean(seeds, 'score'):.1%}".replace("%", " %")


def _mean(seeds: list[Mapping[str, float]], name: str) -> float:
    return sum(seed[name] for seed in seeds) / len(seeds)


def _seeds(arm: Mapping[str, Any], wanted: Collection[str] | None = None) -> list[Mapping[str, float]]:
    """The runs that were scored, of all seeds or of those wanted."""
    return [run for seed, run in arm["seeds"].items() if "score" in run and (wanted is None or seed in wanted)]


TABLES: dict[str, Callable[[], Table]] = {
    "headline": headline,
    "in process": in_process,
    "serve-micro": serve_micro,
    "agent workflows": agent_workflows,
    "agent gains": agent_gains,
    "specialists": specialists,
    **{name: partial(specialist, name) for name in ("planner", "sql", "explainer")},
    "accuracy": partial(accuracy, "smollm2"),
    "accuracy gemma": partial(accuracy, "gemma"),
    "accuracy more": partial(accuracy, "more"),
    "accuracy forms": accuracy_forms,
    "chain": chain,
    "chain shipped": chain_shipped,
    "soak": soak,
}


# ----------------------------------------------------------------------------------------- pages


def shipped() -> dict[str, Any]:
    """What ``icarus/shipped/figures.json`` holds: one measure of each specialist, beside the base model's."""
    scored = {name: value for name, value in result("specialists").items() if name != "settings"}
    figures = {}
    for name, role in scored.items():
        answered = "token F1" in role["specialist"]  # its task has many right answers
        measure = "token F1" if answered else "exact match"
        figures[name] = {
            "task": role["task"],
            "measure": measure,
            "rows": role["f1_rows" if answered else "rows"],
            **{side: role[side][measure] for side in SCORED},
        }
    return figures


def pages() -> Iterator[Path]:
    """The Markdown that figures may stand in."""
    for folder in (ROOT, ROOT / "docs", ROOT / "results", SHIPPED, *sorted(SHIPPED.glob("*/"))):
        yield from sorted(folder.glob("*.md"))


_MARKED = re.compile(r"^<!-- figures: ([^\n]+) -->\n.*?^<!-- end of figures -->$", re.MULTILINE | re.DOTALL)


def written(text: str) -> str:
    """A page with all of its tables as the results have them.

    Raises:
        BadPage: a marker names no table, or is not followed by its end.
    """

    def fill(marked: re.Match[str]) -> str:
        name = marked[1]
        if name not in TABLES:
            raise BadPage(f"There are no figures {name!r}; take one of {', '.join(TABLES)}.")
        return f"<!-- figures: {name} -->\n{markdown(TABLES[name]())}<!-- end of figures -->"

    blocks = len(_MARKED.findall(text))
    if not blocks == text.count("<!-- figures: ") == text.count("<!-- end of figures -->"):
        raise BadPage(
            "Figures begin or end alone; each table has a comment before and behind it, on lines of their own."
        )
    return _MARKED.sub(fill, text)


def markdown(table: Table) -> str:
    """As Markdown has it."""
    head, *rows = table
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Write all pages, and the figures that the package carries."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := written(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: written")
    (SHIPPED / "figures.json").write_text(json.dumps(shipped(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
