"""What good requests pay for the look at their hidden states, which finds values that are not finite.

    python -m experiments.cpu.not_finite --json results/cpu-not-finite.json

One engine serves ICaRus adapters and the base model with the look (``icarus.vllm.worker.not_finite.note``) turned on
and off in turn: for every other decode step of a batch, for every other prompt. The two of a pair come in random order.
A ratio is the median over pairs of the time with the look over the time without, and its interval is that of 95 % of
medians of pairs that are drawn with replacement. The look's own time is beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve_micro import engines
from benchmarks.serve_micro.engine import Measured
from benchmarks.serve_micro.plan import ADAPTERS
from icarus import arguments, base_model, packaged_model
from icarus.bench import measure
from icarus.bench.checkpoints import adapter_name

SEED = 0
PROMPT, WARM_UP = 128, 10
RESAMPLES = 10_000


class Look:
    """The look, on or off, and the seconds that it took in each call."""

    def __init__(self) -> None:
        from icarus.vllm.worker import not_finite

        self.on, self.seconds = True, list[float]()
        self._note = not_finite.note
        setattr(not_finite, "note", self._call)  # noqa: B010

    def _call(self, *args: Any) -> None:
        if self.on:
            started = time.perf_counter()
            self._note(*args)
            self.seconds.append(time.perf_counter() - started)


def pairs(count: int, source: random.Random, look: Look, run: Callable[[], float]) -> list[tuple[float, float]]:
    """Seconds of ``run`` with the look and without it, ``count`` times, in random order."""
    taken = []
    for _ in range(count):
        seconds = {}
        for look.on in source.sample([True, False], 2):
            seconds[look.on] = run()
        taken.append((seconds[True], seconds[False]))
    look.on = True
    return taken


def decoding(measured: Measured, batch: int, adapted: bool, vocabulary: int, steps: int) -> Iterator[float]:
    """Seconds of each step in which all requests of a batch decode one token; prefill is left out."""
    requests = [_request(PROMPT, number, adapted, vocabulary) for number in range(batch)]
    names = {measured.add(request, batch + steps + 1) for request in requests}
    waiting = set(names)
    while waiting:
        waiting -= {output.request_id for output in measured.engine.step()}
    for _ in range(steps):
        started = time.perf_counter()
        measured.engine.step()
        yield time.perf_counter() - started
    measured.engine.abort_request(list(names))
    while measured.engine.has_unfinished_requests():
        measured.engine.step()


def prefill(measured: Measured, adapted: bool, vocabulary: int, tokens: int, numbers: Iterator[int]) -> float:
    """Seconds of one new prompt and its first token."""
    measured.add(_request(tokens, next(numbers), adapted, vocabulary), 1)
    started = time.perf_counter()
    while measured.engine.has_unfinished_requests():
        measured.engine.step()
    return time.perf_counter() - started


def _request(tokens: int, number: int, adapted: bool, vocabulary: int) -> dict[str, Any]:
    source = random.Random(f"{SEED} {tokens} {number} {adapted}")
    prompt = [source.randrange(vocabulary) for _ in range(tokens)]
    return {"prompt": prompt, "adapter": adapter_name(number % ADAPTERS) if adapted else None}


def result(taken: list[tuple[float, float]], look: Look) -> dict[str, Any]:
    """The ratio and its interval, and what the look itself took; empties the list of that."""
    ratios = np.array([on / off for on, off in taken])
    drawn = np.random.default_rng(SEED).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    own, look.seconds = statistics.median(look.seconds), []
    return {
        "pairs": len(taken),
        "ratio": round(float(np.median(ratios)), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "without_ms": round(1e3 * statistics.median(off for _, off in taken), 3),
        "look_ms": round(1e3 * own, 4),
    }


def measurements(measured: Measured, vocabulary: int, count: int, tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and result of each; ``count`` pairs of decode steps, a fifth as many of prompts of ``tokens``."""
    look, source = Look(), random.Random(SEED)
    for batch, adapted in ((1, True), (8, True), (16, True), (8, False)):
        steps = decoding(measured, batch, adapted, vocabulary, 2 * (count + WARM_UP))
        yield f"decode, batch {batch}, {_whose(adapted)}", _measure(count, source, look, steps.__next__)
        list(steps)
    for adapted in (True, False):
        numbers = iter(range(1_000_000))
        one = partial(prefill, measured, adapted, vocabulary, tokens, numbers)
        yield f"prefill, {tokens} tokens, {_whose(adapted)}", _measure(count // 5, source, look, one)


def _whose(adapted: bool) -> str:
    return "specialists" if adapted else "base model"


def _measure(count: int, source: random.Random, look: Look, run: Callable[[], float]) -> dict[str, Any]:
    pairs(min(WARM_UP, count // 10), source, look, run)
    look.seconds = []
    return result(pairs(count, source, look, run), look)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=packaged_model.PACKAGED)
    parser.add_argument("--dtype", default=measure.served_dtype(), choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=200, help="of decode steps, and a fifth as many of prompts")
    parser.add_argument("--tokens", type=int, default=1000, help="of each prompt whose prefill is measured")
    arguments.add_json(parser)
    options = parser.parse_args()
    os.environ.update({**engines.ENVIRONMENT, "VLLM_PLUGINS": "icarus", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    vocabulary = base_model.load(options.base)[0].config.get_text_config().vocab_size
    with tempfile.TemporaryDirectory() as folder:
        adapters = engines.make_adapters(options.base, Path(folder), ["icarus"])["icarus"]
        model = {"model": str(base_model.folder(options.base)), "dtype": options.dtype}
        measured = Measured({**model, **engines.ENGINE, **engines.LORA}, adapters)
        results = {}
        for name, result_ in measurements(measured, vocabulary, options.pairs, options.tokens):
            print(f"{name}: {result_}", flush=True)
            results[name] = result_
    report = {"settings": measure.settings(**vars(options), seed=SEED), "results": results}
    if options.json:
        arguments.write_json(report, options.json)


if __name__ == "__main__":
    main()
