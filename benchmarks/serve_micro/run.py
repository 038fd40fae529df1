"""All rounds of all measurements on all engines, and profiles of them."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.serve_micro import bounds, engines, report
from benchmarks.serve_micro.engine_process import EngineProcess
from benchmarks.serve_micro.engines import ENGINE, ENVIRONMENT, LORA
from benchmarks.serve_micro.plan import (
    ADAPTERS,
    BLOCK,
    PREFILLED,
    RANK,
    SEED,
    SYSTEMS,
    Measurement,
    Sizes,
    measurements,
)
from benchmarks.serve_micro.report import Answers
from icarus import base_model
from icarus.bench import measure
from icarus.errors import InputError

PROFILED_STEPS, PROFILED_ROWS = 20, 30


def run(
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
    present = [system for system in SYSTEMS if system in systems]
    planned = measurements(present)
    settings = measure.settings(base=base, dtype=dtype, rank=RANK, adapters=ADAPTERS, **vars(sizes))
    answers: list[Answers] = []
    idle: list[float] = []
    with tempfile.TemporaryDirectory(prefix="icarus-serve-micro-") as folder:
        adapters = engines.make_adapters(base, Path(folder), present)
        weights = {system: engines.weights(folders) for system, folders in adapters.items()}
        machine = bounds.Machine.measured(dtype)
        for start in range(starts):
            _say(f"start {start + 1} of {starts}")
            with ExitStack() as stack:
                started, about = engines.start(base, dtype, adapters, Path(folder), stack)
                answered, used = _measure(started, planned, sizes)
                answers.append(answered)
                idle.append(used)
                if profile is not None and start == starts - 1:
                    _profile(started, planned, sizes, profile, settings)
    figures = {
        "settings": {
            **settings,
            "engine": ENGINE,
            "lora": LORA,
            "environment": ENVIRONMENT,
            "engines": about,
            "cores_used_by_idle_engines": max(idle),
        },
        "machine": {name: round(value) for name, value in vars(machine).items()},
        **report.build(planned, answers, sizes, machine, shape, weights),
    }
    report.show(figures)
    return figures


def _check(systems: Sequence[str], prompt: int, steps: int) -> None:
    if not engines.has_vllm():
        raise InputError("This measures vLLM, which is not installed; run: pip install 'icarus-llm[cpu]'.")
    if odd := sorted(set(systems) - set(SYSTEMS)):
        raise InputError(f"There is no system {odd[0]!r}; --systems takes some of {', '.join(SYSTEMS)}.")
    room = ENGINE["max_model_len"]
    if prompt + max(steps, BLOCK) + ENGINE["max_num_seqs"] >= room:
        raise InputError(
            f"{prompt} tokens of prompt and {steps} steps do not fit the engines' {room} tokens; take fewer."
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Profiles cannot be written to {folder} ({error.strerror}); name another folder.") from error


def _measure(
    started: Mapping[str, EngineProcess], planned: Iterable[Measurement], sizes: Sizes
) -> tuple[Answers, float]:
    """All rounds of all measurements; and how many cores the engines used that were not asked, on average."""
    answers: Answers = {}
    idle = elapsed = 0.0
    for measurement in planned:
        kept = answers.setdefault(measurement.name, {side.name: [] for side in measurement.sides})
        for round_, sides in measurement.rounds(sizes.repeats):
            said = []
            for side in sides:
                others = [engine for system, engine in started.items() if system != side.system]
                began, before = time.perf_counter(), sum(engine.cpu_seconds() for engine in others)
                answer = started[side.system].ask(measurement.command(side, round_, sizes))
                idle += sum(engine.cpu_seconds() for engine in others) - before
                elapsed += time.perf_counter() - began
                if round_ >= 0:
                    kept[side.name].append(answer)
                figure = measurement.figure(measurement.seconds(answer), sizes)
                said.append(f"{side.name} {figure:.1f}")
            which = f"round {round_ + 1} of {sizes.repeats}" if round_ >= 0 else "to warm up"
            _say(f"{measurement.name}, {which}: {', '.join(said)} {measurement.unit}")
    return answers, round(idle / elapsed, 4)


def _profile(
    started: Mapping[str, EngineProcess],
    planned: Iterable[Measurement],
    sizes: Sizes,
    folder: Path,
    settings: Mapping[str, Any],
) -> None:
    """A text for each engine: the operators that its decode steps and its prefill spend their time in."""
    sizes = replace(sizes, steps=PROFILED_STEPS)
    texts = {system: [_heading(system, settings)] for system in started}
    for measurement in planned:
        if measurement.turns > 1:
            continue
        for side in measurement.sides:
            if side.adapted != (side.system != "base"):
                continue
            # A round that no measurement had, so that no prompt is in the cache.
            command = measurement.command(side, sizes.repeats, sizes)
            answer = started[side.system].ask({"do": "profile", "measure": command, "rows": PROFILED_ROWS})
            what = f"{PROFILED_STEPS} steps" if measurement.batch else f"{PREFILLED} prompts of {sizes.prompt} tokens"
            texts[side.system].append(f"{measurement.name}, {what}\n\n{answer['table']}")
            _say(f"profile of {side.name}: {measurement.name}")
    for system, parts in texts.items():
        (folder / f"{system}.txt").write_text("\n\n".join(parts), encoding="utf-8")


def _heading(system: str, settings: Mapping[str, Any]) -> str:
    where = ", ".join(f"{name} {settings[name]}" for name in ("commit", "date", "cpu", "cores", "dtype"))
    return (
        f"Engine {system!r} of benchmarks/serve_micro under PyTorch's profiler, which slows what it watches: the\n"
        f"shares count, not the sums. {where}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
