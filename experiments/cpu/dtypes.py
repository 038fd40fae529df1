"""float32 beside bfloat16 in vLLM on this processor, and where the time of a decode step goes.

    python -m experiments.cpu.dtypes --json results/cpu-dtypes/as-it-is.json
    python -m experiments.cpu.dtypes --avx2 --dtypes float32 --repeats 3 --json results/cpu-dtypes/avx2-emulated.json

Engines with ICaRus adapters take turns, one for each dtype: prefill, and decoding at batch 1, 2 and 8, of specialists
and of the base model. Beside each figure stands the least time that the machine needs to read what
must be read, by the bandwidth that was measured in the same run (``benchmarks.serve_micro.bounds``). Decoding of two
specialists' requests runs once more under PyTorch's profiler, whose tables lie beside the JSON file.

``--avx2`` has torch, oneDNN, MKL and vLLM take this processor for one with AVX2 alone. That shows which kernels are
chosen there, and not how fast such a processor is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.serve_micro import bounds, engines
from benchmarks.serve_micro.engine_process import COMMAND, EngineProcess
from benchmarks.serve_micro.plan import Measurement, Side, Sizes
from icarus import arguments, base_model, packaged_model
from icarus.bench import measure

DTYPES = ("bfloat16", "float32")
SIDES = (Side("icarus", adapted=True), Side("icarus", adapted=False))
PLANNED = [
    *(Measurement(f"decode, batch {batch}", "tokens/s", SIDES, batch=batch) for batch in (1, 2, 8)),
    Measurement("prefill", "tokens/s", SIDES),
]
PROFILED, PROFILED_STEPS, PROFILED_ROWS = PLANNED[1], 20, 25
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# vLLM asks torch.cpu, which goes by the processor alone.
AS_AVX2 = f"""
import runpy, torch
for name in dir(torch.cpu):
    if name.startswith("_is_") and name != "_is_avx2_supported":
        setattr(torch.cpu, name, lambda: False)
runpy.run_path({COMMAND[-1]!r}, run_name="__main__")
"""


def start(
    dtypes: list[str], base: str, adapters: dict[str, str], folder: Path, avx2: bool, stack: ExitStack
) -> dict[str, EngineProcess]:
    """An engine for each dtype, ready."""
    command = [sys.executable, "-P", "-c", AS_AVX2] if avx2 else COMMAND
    started = {}
    for dtype in dtypes:
        environment = engines.environment("icarus", os.environ)
        process = EngineProcess(dtype, folder / f"{dtype}.log", environment, command)
        started[dtype] = stack.enter_context(process)
        options = {"model": str(base_model.folder(base)), "dtype": dtype}
        process.ask({"engine": {**options, **engines.ENGINE, **engines.LORA}, "adapters": adapters})
        print(f"{dtype}: ready", file=sys.stderr, flush=True)
    return started


def rounds(started: dict[str, EngineProcess], sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """Seconds by measurement and side, and by dtype."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in range(-1, sizes.repeats):
        for one in PLANNED:
            for side in one.sides:
                taken = seconds.setdefault(f"{one.name}: {side.name}", {dtype: [] for dtype in started})
                for dtype in list(started)[:: 1 if number % 2 == 0 else -1]:
                    answer = started[dtype].ask(one.command(side, number, sizes))
                    if number >= 0:
                        taken[dtype].append(one.seconds(answer))
    return seconds


def figures(seconds: dict[str, dict[str, list[float]]], sizes: Sizes, base: str, weights: int) -> dict[str, Any]:
    """Medians in milliseconds and tokens a second, and what they are bound by."""
    dtypes = list(next(iter(seconds.values())))
    machines = {dtype: bounds.Machine.measured(dtype) for dtype in dtypes}
    shapes = {dtype: bounds.Shape.of(base_model.load(base, dtype=dtype, device="cpu")[0]) for dtype in dtypes}
    results: dict[str, Any] = {}
    for one in PLANNED:
        for side in one.sides:
            name = f"{one.name}: {side.name}"
            works = one.works(side, sizes, weights)
            results[name] = {
                dtype: {
                    "tokens_per_s": round(one.figure(statistics.median(taken), sizes), 1),
                    **measure.summary(taken),
                    **bounds.bound(machines[dtype], shapes[dtype], works),
                }
                for dtype, taken in seconds[name].items()
            }
            if set(dtypes) == set(DTYPES):
                float32, bfloat16 = (statistics.median(seconds[name][dtype]) for dtype in ("float32", "bfloat16"))
                results[name]["float32_over_bfloat16"] = round(float32 / bfloat16, 3)
    return {"machine": {dtype: vars(machine) for dtype, machine in machines.items()}, "results": results}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=packaged_model.PACKAGED)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of each prompt whose prefill is measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--avx2", action="store_true", help="as on a processor with AVX2 alone")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    os.environ.update(AVX2 if options.avx2 else {})
    vocabulary = base_model.load(options.base)[0].config.get_text_config().vocab_size
    sizes = Sizes(prompt=options.prompt, steps=16, starts=1, repeats=options.repeats, vocabulary=vocabulary, seed=0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        adapters = engines.make_adapters(options.base, Path(folder), ["icarus"])["icarus"]
        started = start(options.dtypes, options.base, adapters, Path(folder), options.avx2, stack)
        report = figures(rounds(started, sizes), sizes, options.base, engines.weights(adapters))
        settings = measure.settings(base=options.base, avx2_emulated=options.avx2, **vars(sizes))
        arguments.write_json({"settings": settings, **report}, str(options.json))
        for dtype, process in started.items():
            command = PROFILED.command(SIDES[0], sizes.repeats, Sizes(**{**vars(sizes), "steps": PROFILED_STEPS}))
            answer = process.ask({"do": "profile", "measure": command, "rows": PROFILED_ROWS})
            heading = (
                f"{PROFILED.name} of specialists in {dtype}, {PROFILED_STEPS} steps; the shares count, not the sums\n"
            )
            options.json.with_suffix(f".{dtype}.txt").write_text(f"{heading}\n{answer['table']}", encoding="utf-8")


if __name__ == "__main__":
    main()
