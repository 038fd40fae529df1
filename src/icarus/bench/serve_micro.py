"""``icarus bench serve-micro``: stock vLLM and the plugin, engine beside engine, one taking turns with another.

    base           vLLM without LoRA and without the plugin: the base model as fast as vLLM serves it here
    stock          vLLM's multi-LoRA without the plugin, conventional adapters
    conventional   the plugin with its CPU operators, the same conventional adapters
    icarus         the plugin with its CPU operators, ICaRus adapters

Each is one process with one engine (``vllm.LLM``, engine core in the same process) that waits without using a core
while another is measured. All are the same but for the plugin, LoRA and the adapters. All may compile the model, as is
vLLM's default, which stock vLLM turns off on CPUs where LoRA is on. Prompts are token ids, and nothing is detokenized,
so what is measured is the engine: scheduling, the model, sampling.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from icarus import arguments, base_model
from icarus.bench import bounds, checkpoints, measure, micro_goals
from icarus.bench.engine_process import EngineProcess
from icarus.bench.micro_plan import (
    ADAPTERS,
    BLOCK,
    PREFILLED,
    RANK,
    SYSTEMS,
    Measurement,
    Message,
    Sizes,
    adapter_name,
    measurements,
)
from icarus.errors import InputError
from icarus.vllm_environment import variables

SEED = 0
PROFILED_STEPS, PROFILED_ROWS = 20, 30

ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "block_size": BLOCK,
    "enable_prefix_caching": True,
    "seed": SEED,
}
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": ADAPTERS, "max_lora_rank": RANK}
ENVIRONMENT = {
    **variables({}),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB for each engine
    "VLLM_NO_USAGE_STATS": "1",  # its thread would run beside the first measurements
}
_WITH_PLUGIN = {"conventional", "icarus"}

Answers = dict[str, dict[str, list[Message]]]
"""Of one start of the engines, by measurement and side, in the order of rounds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    measure.add_arguments(parser, dtype="bfloat16", repeats=5)
    parser.add_argument(
        "--systems",
        type=lambda text: text.split(","),
        default=["base", "stock", "conventional", "icarus"],
        help="engines to compare (default: base,stock,conventional,icarus)",
    )
    count = arguments.positive_int
    parser.add_argument("--starts", type=count, default=1, help="starts of all engines, as two differ (default: 1)")
    parser.add_argument("--prompt-tokens", type=count, default=1000, help="of prefill and chain (default: 1000)")
    parser.add_argument("--steps", type=count, default=32, help="decode steps of each sample (default: 32)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also profile each engine, a text file each")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line says; returns the report."""
    return compare(
        options.base,
        options.dtype,
        options.repeats,
        starts=options.starts,
        systems=options.systems,
        prompt=options.prompt_tokens,
        steps=options.steps,
        profile=options.profile,
    )


def compare(
    base: str,
    dtype: str,
    repeats: int,
    *,
    starts: int,
    systems: Sequence[str],
    prompt: int,
    steps: int,
    profile: Path | None,
) -> dict[str, Any]:
    """Measure, print tables, and return the report. Raises InputError, and EngineFailed if an engine ends."""
    _check(systems, prompt, steps)
    if profile is not None:
        _make(profile)
    model, _ = base_model.load(base, dtype=dtype, device="cpu")
    sizes = Sizes(prompt, steps, starts, repeats, vocabulary=model.config.get_text_config().vocab_size, seed=SEED)
    shape = bounds.Shape.of(model)
    del model
    planned = measurements([system for system in SYSTEMS if system in systems])
    settings = measure.settings(base=base, dtype=dtype, rank=RANK, adapters=ADAPTERS, **vars(sizes))
    answers: list[Answers] = []
    idle: list[float] = []
    with tempfile.TemporaryDirectory(prefix="icarus-serve-micro-") as folder:
        adapters = _adapters(base, Path(folder), systems)
        weights = {system: _weights(folders) for system, folders in adapters.items()}
        machine = bounds.Machine.measured(dtype)
        for start in range(starts):
            _say(f"start {start + 1} of {starts}")
            with ExitStack() as stack:
                engines, about = _start(base, dtype, systems, adapters, Path(folder), stack)
                answered, used = _measure(engines, planned, sizes)
                answers.append(answered)
                idle.append(used)
                if profile is not None and start == starts - 1:
                    _profile(engines, planned, sizes, profile, settings)
    report = {
        "settings": {
            **settings,
            "engine": ENGINE,
            "lora": LORA,
            "environment": ENVIRONMENT,
            "engines": about,
            "cores_used_by_idle_engines": max(idle),
        },
        "machine": {name: round(value) for name, value in vars(machine).items()},
        **_evaluated(planned, answers, sizes, machine, shape, weights),
    }
    _show(report)
    return report


def _check(systems: Sequence[str], prompt: int, steps: int) -> None:
    if not _has_vllm():
        raise InputError("serve-micro measures vLLM, which is not installed; run: pip install 'icarus-llm[cpu]'.")
    if odd := sorted(set(systems) - set(SYSTEMS)):
        raise InputError(f"There is no system {odd[0]!r}; --systems takes some of {', '.join(SYSTEMS)}.")
    room = ENGINE["max_model_len"]
    if prompt + max(steps, BLOCK) + ENGINE["max_num_seqs"] >= room:
        raise InputError(
            f"{prompt} tokens of prompt and {steps} steps do not fit the engines' {room} tokens; take fewer."
        )


def _has_vllm() -> bool:
    """A folder of that name on the path is a namespace package, which has no origin."""
    return getattr(importlib.util.find_spec("vllm"), "origin", None) is not None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Profiles cannot be written to {folder} ({error.strerror}); name another folder.") from error


def _adapters(base: str, folder: Path, systems: Iterable[str]) -> dict[str, dict[str, str]]:
    """By system: the folders of its adapters by name."""
    kinds = {system: "icarus" if system == "icarus" else "conventional" for system in systems if system != "base"}
    checkpoints.make_adapters(base_model.folder(base), folder, sorted(set(kinds.values())), ADAPTERS, RANK, SEED)
    return {
        system: {adapter_name(k): str(folder / kinds[system] / f"agent-{k}") for k in range(ADAPTERS)}
        if system in kinds
        else {}
        for system in systems
    }


def _weights(adapters: Mapping[str, str]) -> int:
    """Numbers in one adapter."""
    from safetensors import safe_open

    if not adapters:
        return 0
    with safe_open(Path(next(iter(adapters.values()))) / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # no mapping


def _environment(system: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Of an engine: the caller's, less what would make a system something else than its name says."""
    kept = {name: value for name, value in inherited.items() if not name.startswith("ICARUS_CPU")}
    threads = kept.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    plugins = "icarus" if system in _WITH_PLUGIN else ""
    return {**kept, **ENVIRONMENT, "OMP_NUM_THREADS": threads, "VLLM_PLUGINS": plugins}


def _start(
    base: str,
    dtype: str,
    systems: Sequence[str],
    adapters: Mapping[str, dict[str, str]],
    folder: Path,
    stack: ExitStack,
) -> tuple[dict[str, EngineProcess], dict[str, Message]]:
    """All engines, ready, and what they say of themselves."""
    engines, about = {}, {}
    for system in systems:
        started = time.perf_counter()
        log = folder / f"{system}.log"
        engines[system] = stack.enter_context(EngineProcess(system, log, _environment(system, os.environ)))
        options = {"model": str(base_model.folder(base)), "dtype": dtype, **ENGINE}
        if system != "base":
            options |= LORA
        about[system] = engines[system].ask({"engine": options, "adapters": adapters[system]})
        _say(f"engine {system}: ready in {time.perf_counter() - started:.0f} s")
    return engines, about


def _measure(
    engines: Mapping[str, EngineProcess], planned: Iterable[Measurement], sizes: Sizes
) -> tuple[Answers, float]:
    """All rounds of all measurements; and how many cores the engines used that were not asked, on average."""
    answers: Answers = {}
    idle = elapsed = 0.0
    for measurement in planned:
        kept = answers.setdefault(measurement.name, {side.name: [] for side in measurement.sides})
        for round_, sides in measurement.rounds(sizes.repeats):
            said = []
            for side in sides:
                others = [engine for system, engine in engines.items() if system != side.system]
                started, before = time.perf_counter(), sum(engine.cpu_seconds() for engine in others)
                answer = engines[side.system].ask(measurement.command(side, round_, sizes))
                idle += sum(engine.cpu_seconds() for engine in others) - before
                elapsed += time.perf_counter() - started
                if round_ >= 0:
                    kept[side.name].append(answer)
                figure = measurement.figure(measurement.seconds(answer), sizes)
                said.append(f"{side.name} {figure:.1f}")
            which = f"round {round_ + 1} of {sizes.repeats}" if round_ >= 0 else "to warm up"
            _say(f"{measurement.name}, {which}: {', '.join(said)} {measurement.unit}")
    return answers, round(idle / elapsed, 4)


def _evaluated(
    planned: Iterable[Measurement],
    starts: Sequence[Answers],
    sizes: Sizes,
    machine: bounds.Machine,
    shape: bounds.Shape,
    adapter_weights: Mapping[str, int],
) -> dict[str, Any]:
    """The report's figures, ratios and goals, with the raw answers that they are made of."""
    tables: dict[str, Any] = {}
    seconds = [_seconds(planned, answers) for answers in starts]
    for measurement in planned:
        sides = {}
        for side in measurement.sides:
            given = [answer for answers in starts for answer in answers[measurement.name][side.name]]
            taken = [sample for start in seconds for sample in start[measurement.name][side.name]]
            least = bounds.bound(machine, shape, measurement.works(side, sizes, adapter_weights[side.system]))
            sides[side.name] = {
                "median": round(measurement.figure(statistics.median(taken), sizes), 2),
                **measure.summary(taken),
                "bound": least | {"share": round(least["bound_ms"] / 1e3 / statistics.median(taken), 3)},
                "samples": [_rounded(answer) for answer in given],
            }
            if measurement.turns > 1:
                sides[side.name]["prefilled_tokens"] = max(map(micro_goals.prefilled, given))
        tables[measurement.name] = {"unit": measurement.unit, "sides": sides}
    goals = micro_goals.results(seconds)
    if chains := [chain for answers in starts for chain in answers.get("chain", {}).get("icarus", [])]:
        goals.append(micro_goals.prefilled_once(chains, sizes.prompt))
    return {"goals": goals, "measurements": tables}


def _seconds(planned: Iterable[Measurement], answers: Answers) -> dict[str, dict[str, list[float]]]:
    """What each sample of a start took, by measurement and side."""
    return {
        measurement.name: {
            side: [measurement.seconds(answer) for answer in given] for side, given in answers[measurement.name].items()
        }
        for measurement in planned
    }


def _rounded(answer: Any) -> Any:
    """Seconds to the microsecond."""
    if isinstance(answer, dict):
        return {name: _rounded(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [_rounded(value) for value in answer]
    return round(answer, 6) if isinstance(answer, float) else answer


def _profile(
    engines: Mapping[str, EngineProcess],
    planned: Iterable[Measurement],
    sizes: Sizes,
    folder: Path,
    settings: Mapping[str, Any],
) -> None:
    """A text for each engine: the operators that its decode steps and its prefill spend their time in."""
    sizes = replace(sizes, steps=PROFILED_STEPS)
    texts = {system: [_heading(system, settings)] for system in engines}
    for measurement in planned:
        if measurement.turns > 1:
            continue
        for side in measurement.sides:
            if side.adapted != (side.system != "base"):
                continue
            # A round that no measurement had, so that no prompt is in the cache.
            command = measurement.command(side, sizes.repeats, sizes)
            answer = engines[side.system].ask({"do": "profile", "measure": command, "rows": PROFILED_ROWS})
            what = f"{PROFILED_STEPS} steps" if measurement.batch else f"{PREFILLED} prompts of {sizes.prompt} tokens"
            texts[side.system].append(f"{measurement.name}, {what}\n\n{answer['table']}")
            _say(f"profile of {side.name}: {measurement.name}")
    for system, parts in texts.items():
        (folder / f"{system}.txt").write_text("\n\n".join(parts), encoding="utf-8")


def _heading(system: str, settings: Mapping[str, Any]) -> str:
    where = ", ".join(f"{name} {settings[name]}" for name in ("commit", "date", "cpu", "cores", "dtype"))
    return (
        f"Engine {system!r} of icarus bench serve-micro under PyTorch's profiler, which slows what it watches: the\n"
        f"shares count, not the sums. {where}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(report: Mapping[str, Any]) -> None:
    console = Console()
    settings = report["settings"]
    for name, found in report["measurements"].items():
        console.print(_table(f"{name}, rank {settings['rank']}, {settings['dtype']}", found["unit"], found["sides"]))
    _show_goals(console, report["goals"])
    machine = report["machine"]
    console.print(
        f"Bounds: this machine reads {machine['read_bytes_per_s'] / 1e9:.1f} GB/s and multiplies at "
        f"{machine['flops_per_s'] / 1e12:.2f} TFLOP/s, measured before. What is above a bound is the engine's own time "
        "(--profile shows whose)."
    )


def _table(title: str, unit: str, sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """One measurement: a line for each side."""
    table = Table(title=title)
    chain = any("prefilled_tokens" in figures for figures in sides.values())
    table.add_column("")
    for column in (unit, "ms (quartiles)", "bound, its share", *(["prefilled"] if chain else [])):
        table.add_column(column, justify="right")
    for side, figures in sides.items():
        least = figures["bound"]
        row = [
            side,
            f"{figures['median']:.1f}",
            f"{figures['median_ms']:.1f} ({figures['p25_ms']:.1f} to {figures['p75_ms']:.1f})",
            f"{least['by']} {least['bound_ms']:.1f} ms, {least['share']:.0%}",
        ]
        table.add_row(*row, *([f"{figures['prefilled_tokens']:,} tokens"] if chain else []))
    return table


def _show_goals(console: Console, goals: Iterable[Mapping[str, Any]]) -> None:
    table = Table(title="Ratios of speed (lowest and highest of a round), and goals")
    for column in ("", "measured", "goal", ""):
        table.add_column(column, justify="right" if column in ("measured", "goal") else "left")
    for goal in goals:
        if "at_most" in goal:
            wanted, value = f"at most {goal['at_most']:,}", f"{goal['value']:,}"
        else:
            wanted = f"at least {goal['at_least']}x" if goal["at_least"] else ""
            value = f"{goal['value']:.2f}x ({goal['lowest']:.2f} to {goal['highest']:.2f})"
        table.add_row(goal["what"], value, wanted, {True: "met", False: "MISSED", None: ""}[goal["met"]])
    console.print(table)
