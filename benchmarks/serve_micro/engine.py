"""One engine in a process of its own, which ``run.py`` asks for measurements.

    python -P engine.py

reads one JSON object a line from standard input and answers each with one line on standard output. Everything that
vLLM prints goes to standard error. The first line says what to start; it is answered when the engine is ready:

    {"engine": {...}, "adapters": {"name": "folder", ...}}    vllm.LLM's arguments, and what to serve as LoRA modules

The next ones ask for one measurement each, with token ids as prompts and null for the base model:

    {"do": "decode", "requests": [{"prompt": [...], "adapter": "name"}, ...], "steps": 32}
        all requests in one batch; the seconds of steps in which each of them decodes one token, prefill left out
    {"do": "turns", "requests": [...], "tokens": 16}
        the requests one after another; the seconds of each, its prompt tokens and how many were in the cache
    {"do": "profile", "measure": {"do": "decode" or "turns", ...}, "rows": 30}
        the same under PyTorch's profiler; its table of operators by own time

An error in a command is its answer: {"error": "..."}. The process ends with its standard input, or with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any

Message = dict[str, Any]
Around = Callable[[], AbstractContextManager[Any]]
"""Makes a context that the measured part runs in: a profiler, or nothing."""


class Measured:
    """An engine and the adapters that it serves; ``answer`` takes one command."""

    def __init__(self, engine: Message, adapters: dict[str, str]) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.engine: Any = LLM(**engine).llm_engine
        self.adapters = {name: LoRARequest(name, i, folder) for i, (name, folder) in enumerate(adapters.items(), 1)}
        self._ids = count()

    def about(self) -> Message:
        """What a figure depends on and only this process knows."""
        import torch
        import vllm

        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "plugins": os.environ.get("VLLM_PLUGINS"),
        }

    def answer(self, command: Message) -> Message:
        """Takes one measurement. Raises ValueError for a command that there is not."""
        if command["do"] == "profile":
            return {"table": self._profile(command["measure"], command["rows"])}
        return self._measure(command, nullcontext)

    def _measure(self, command: Message, around: Around) -> Message:
        if command["do"] == "decode":
            return {"step_seconds": self._decode(command["requests"], command["steps"], around)}
        if command["do"] == "turns":
            with around():
                return {"turns": [self._turn(request, command["tokens"]) for request in command["requests"]]}
        raise ValueError(f"There is no command {command['do']!r}.")

    def _decode(self, requests: list[Message], steps: int, around: Around) -> list[float]:
        """Seconds of ``steps`` steps, each of which decodes one token of every request."""
        # Short prompts may be prefilled a few at a time, while the first ones already decode.
        waiting = {self.add(request, len(requests) + steps + 1) for request in requests}
        everybody = set(waiting)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step()}
        seconds = []
        with around():
            for _ in range(steps):
                started = time.perf_counter()
                answered = {output.request_id for output in self.engine.step()}
                seconds.append(time.perf_counter() - started)
                if answered != everybody:
                    raise RuntimeError(f"A step decoded {len(answered)} of {len(everybody)} requests.")
        self.engine.abort_request(list(everybody))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return seconds

    def _turn(self, request: Message, tokens: int) -> Message:
        """One request alone, from its arrival to its last token."""
        started = time.perf_counter()
        self.add(request, tokens)
        *_, last = self._outputs()
        return {
            "seconds": time.perf_counter() - started,
            "prompt_tokens": len(last.prompt_token_ids),
            "cached_tokens": last.num_cached_tokens,
            "tokens": len(last.outputs[0].token_ids),
        }

    def _outputs(self) -> Iterator[Any]:
        while self.engine.has_unfinished_requests():
            yield from self.engine.step()

    def add(self, request: Message, tokens: int) -> str:
        """Hands a request to the engine, greedy and of a fixed length; returns its id."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        name = str(next(self._ids))
        adapter = request["adapter"]
        self.engine.add_request(
            name,
            tokens_input(request["prompt"]),
            SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=tokens),
            lora_request=None if adapter is None else self.adapters[adapter],
        )
        return name

    def _profile(self, command: Message, rows: int) -> str:
        from torch.profiler import ProfilerActivity, profile

        profiler: Any = profile(activities=[ProfilerActivity.CPU])
        self._measure(command, lambda: profiler)
        table: str = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows)
        return table


def main() -> None:
    """Start the engine of the first line, then answer line by line."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # before vLLM is imported: its loggers write there
    _end_with_parent()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core in this process, so that it can be profiled
    measured: Measured | None = None
    for line in sys.stdin:
        try:
            command = json.loads(line)
            if measured is None:
                measured = Measured(**command)
                answer = measured.about()
            else:
                answer = measured.answer(command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _end_with_parent() -> None:
    """Linux kills this process when its parent is gone, even in the middle of a measurement (prctl(2))."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    main()
