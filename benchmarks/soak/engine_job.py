"""One engine in a process of its own, which does the operations of a mix and writes down what came of each.

    python -m benchmarks.soak.engine_job < job.json

The job has ``engine`` (options of vLLM's ``LLM``), ``pair_from`` (``MIN_PAIRED_KEYS`` of the plugin's attention on
CPUs), ``shop``, ``operations`` (mix.py) and ``result``, the file to write.
Steps are taken one by one in this process, so a job always goes the same way.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are ours, and errors of the core arrive as exceptions

from benchmarks.soak.mix import BASE, Request
from benchmarks.soak.record import Record
from benchmarks.soak.shop import Shop

PATIENCE = 3000
"""Steps in which an engine of so few requests must have answered all."""


class Job:
    """An engine, its adapters, and the records of its requests."""

    def __init__(self, llm: Any, shop: Shop) -> None:
        self.engine, self.shop = llm.llm_engine, shop
        self.records: dict[int, Record] = {}
        self.swaps = self.renewals = self.reloads = self.steps = 0
        self._loaded: dict[str, dict[str, Any]] = {}  # what a request of an adapter names
        self._version: dict[str, int] = {}
        self._ids = 0
        for name in [*shop.specialists, *shop.conventional]:
            self._load(name, 0)

    def do(self, operation: dict[str, Any]) -> None:
        """One operation of a mix."""
        actions: dict[str, Callable[[Any], None]] = {
            "ask": lambda given: self.ask(Request(**given)),
            "step": self.step,
            "cancel": self.cancel,
            "quiet": self.quiet,
            "swap": lambda given: self.swap(*given),
            "renew": lambda given: self.renew(*given),
            "reload": lambda name: self.swap(name, self._version[name], again=True),
        }
        [(action, given)] = operation.items()
        actions[action](given)

    def ask(self, request: Request) -> None:
        """Let a request enter."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        before = self.records.get(request.follows) if request.follows is not None else None
        prompt = [*before.prompt, *before.tokens, *request.prompt] if before else request.prompt
        named = request.model != BASE
        self.records[request.number] = Record(request, prompt, [self._version[request.model]] if named else [0])
        params = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            max_tokens=request.max_tokens,
            prompt_logprobs=0 if request.scored else None,
            output_kind=RequestOutputKind.DELTA if request.streamed else RequestOutputKind.FINAL_ONLY,
        )
        lora = LoRARequest(**self._loaded[request.model]) if named else None
        self.engine.add_request(str(request.number), {"prompt_token_ids": prompt}, params, lora_request=lora)

    def step(self, count: int) -> None:
        """Up to so many steps; fewer where nothing is left to do."""
        for _ in range(count):
            if not self.engine.has_unfinished_requests():
                return
            self.steps += 1
            for output in self.engine.step():
                self._note(output)

    def cancel(self, number: int) -> None:
        """As a client that hangs up does."""
        record = self.records[number]
        if record.open:
            record.cancelled = True
            self.engine.abort_request([str(number)])

    def quiet(self, name: str) -> None:
        """Step until no request of an adapter is left."""
        self._until(lambda: not any(r.open and r.request.model == name for r in self.records.values()))

    def drain(self) -> None:
        """Step until all requests are answered."""
        self._until(lambda: not any(record.open for record in self.records.values()))
        self.step(8)  # of cancelled ones something may be left

    def swap(self, name: str, version: int, again: bool = False) -> None:
        """Replace an ICaRus adapter under its name and id."""
        from vllm.lora.request import LoRARequest

        changed = {**self._loaded[name], "lora_path": str(self.shop.folder(name, version))}
        assert self.engine.add_lora(LoRARequest(**changed, load_inplace=True))
        self._loaded[name] = changed
        self._version[name] = version
        self.swaps += not again
        self.reloads += again
        for record in self.records.values():
            if record.open and record.request.model == name:
                record.versions.append(version)

    def renew(self, name: str, version: int) -> None:
        """Unload an adapter that nobody uses, and load it anew under another id."""
        assert self.engine.remove_lora(self._loaded[name]["lora_int_id"]) is not None
        self._load(name, version)
        self.renewals += 1

    def summary(self, llm: Any) -> dict[str, Any]:
        """Counts, and what must be as it was when all is done."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        manager = scheduler.kv_cache_manager
        pool = manager.block_pool
        return {
            "steps": self.steps,
            "swaps": self.swaps,
            "renewals": self.renewals,
            "reloads": self.reloads,
            "preemptions": counted.get("vllm:num_preemptions", 0),
            "blocks_in_use": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),  # one is vLLM's null block
            "requests_left": len(scheduler.requests),
        }

    def _load(self, name: str, version: int) -> None:
        from vllm.lora.request import LoRARequest

        self._ids += 1
        own = name if name in self.shop.specialists else f"{name}#{self._ids}"
        folder = self.shop.folder(name, version)
        self._loaded[name] = {"lora_name": own, "lora_int_id": self._ids, "lora_path": str(folder)}
        self._version[name] = version
        assert self.engine.add_lora(LoRARequest(**self._loaded[name]))

    def _until(self, done: Callable[[], bool]) -> None:
        for _ in range(PATIENCE):
            if done():
                return
            self.step(1)

    def _note(self, output: Any) -> None:
        record = self.records[int(output.request_id)]
        first = output.outputs[0]
        if record.cancelled:
            record.late |= bool(first.token_ids)
            return
        record.tokens += first.token_ids
        if record.request.streamed:
            record.at += [len(record.versions) - 1] * len(first.token_ids)
        if output.num_cached_tokens is not None:
            record.cached = output.num_cached_tokens
        if output.prompt_logprobs:
            record.scores = [
                at[token].logprob for token, at in zip(record.prompt[1:], output.prompt_logprobs[1:], strict=True)
            ]
        if output.finished:
            record.finished = first.finish_reason


def main() -> None:
    """Start the engine, do all operations, write what came of them; an engine that died is a result as well."""
    given = json.load(sys.stdin)
    from vllm import LLM

    from icarus.vllm.cpu import attention

    attention.MIN_PAIRED_KEYS = given["pair_from"]
    llm = LLM(**given["engine"])
    job, error = Job(llm, Shop.from_json(given["shop"])), ""
    try:
        for operation in given["operations"]:
            job.do(operation)
        job.drain()
    except Exception:
        error = traceback.format_exc()
    result = {
        "error": error,
        "summary": {} if error else job.summary(llm),
        "records": [record.as_json() for record in job.records.values()],
    }
    Path(given["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
