"""Rounds of random load on a tiny model, each in an engine of its own, compared with contexts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.soak.judge import SCORE, TIE, Judge, Right
from benchmarks.soak.mix import BASE, Mix, Operation, engine_options
from benchmarks.soak.shop import Shop, any_tokens
from icarus import vllm_environment

ROUND = 400
"""Requests of one engine."""

ENGINE_SECONDS = 3600
"""After which an engine counts as one that hangs; the machine may be busy with other things."""

UNDER_WAY = 2
"""Tokens of a request that asynchronous scheduling may have under way."""

FIXED: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "block_size": 32,
    "enable_lora": True,
    "max_lora_rank": 8,
    "seed": 0,
    "disable_log_stats": False,
}

Job = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that went wrong: which request, or -1 where it is the engine itself."""

    number: int
    what: str


def job_of(shop: Shop, seed: str, requests: int, *, compiled: bool = False) -> Job:
    """A round: the engine's options and what is done to it."""
    mix = Mix(seed, list(shop.specialists), list(shop.conventional), draw=any_tokens)
    engine = {"model": str(shop.base), **FIXED, **engine_options(seed, compiled=compiled)}
    pair_from = random.Random(f"pairs {seed}").choice((0, 100, 10**9))  # keys, from which on decodes run as pairs
    return {"engine": engine, "pair_from": pair_from, "operations": mix.operations(requests)}


def run_job(shop: Shop, job: Job, log: Path) -> Any:
    """What an engine of its own makes of a job; its output goes to ``log``."""
    with tempfile.TemporaryDirectory(prefix="icarus-soak-") as folder:
        result = Path(folder) / "result.json"
        given = {**job, "shop": shop.as_json(), "result": str(result)}
        with log.open("w", encoding="utf-8") as sink:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.soak.engine_job"],
                    input=json.dumps(given),
                    env={**vllm_environment.variables(os.environ), **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
                    stdout=sink,
                    stderr=sink,
                    text=True,
                    timeout=ENGINE_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return _nothing(f"the engine's process did not end within {ENGINE_SECONDS} s")
        if done.returncode or not result.exists():
            return _nothing(f"the engine's process ended with {done.returncode}")
        return json.loads(result.read_text(encoding="utf-8"))


def _nothing(error: str) -> dict[str, Any]:
    return {"error": error, "summary": {}, "records": []}


def faults_of(result: Any, judge: Judge) -> list[Fault]:
    """Everything that is wrong with what a job gave."""
    faults = [Fault(number=-1, what=result["error"])] if result["error"] else []
    for record in result["records"]:
        if result["error"] and not (record["finished"] or record["cancelled"]):
            continue  # the engine died under it
        if what := judge.fault(record):
            faults.append(Fault(number=record["request"]["number"], what=what))
    for count in ("blocks_in_use", "requests_left"):
        if left := result["summary"].get(count):
            faults.append(Fault(number=-1, what=f"{count} is {left} when all is done"))
    return faults


def counted(job: Job, result: Any) -> Counter[str]:
    """Requests by what they were, and what went on beside them."""
    counts: Counter[str] = Counter(result["summary"])
    budget = job["engine"]["max_num_batched_tokens"]
    conventional = set(result.get("conventional", ()))
    for record in result["records"]:
        request = record["request"]
        kind = BASE if request["model"] == BASE else "conventional" if request["model"] in conventional else "icarus"
        counts["requests"] += 1
        counts[kind] += 1
        counts["streamed"] += request["streamed"]
        counts["scored"] += request["scored"]
        counts["cancelled"] += record["cancelled"]
        counts["following"] += request["follows"] is not None
        counts["chunked"] += len(record["prompt"]) - (record["cached"] or 0) > budget
        counts["found_prefix"] += bool(record["cached"])
        counts["swapped_while_open"] += len(record["versions"]) > 1
    return counts


# ---------------------------------------------------------------------------------------------- the smallest of it


def smallest(job: Job, fails: Callable[[Job], bool], tries: int) -> Job:
    """A job with fewer operations that fails alike: halves, quarters, ... are left out while it does.

    ``fails`` runs a job and tells whether the same is wrong with it. At most ``tries`` runs.
    """
    operations, size = list(job["operations"]), max(1, len(job["operations"]) // 2)
    while size and tries:
        start = 0
        while start < len(operations) and tries:
            fewer = _consistent(operations[:start] + operations[start + size :])
            if len(fewer) == len(operations):
                start += size
                continue
            tries -= 1
            if fails({**job, "operations": fewer}):
                operations = fewer
            else:
                start += size
        size //= 2
    return {**job, "operations": operations}


def _consistent(operations: Sequence[Operation]) -> list[Operation]:
    """Without what refers to requests that were left out."""
    asked: set[int] = set()
    kept = []
    for operation in operations:
        [(action, given)] = operation.items()
        if action == "ask":
            asked.add(given["number"])
        elif action == "cancel" and given not in asked:
            continue
        kept.append(operation)
    return kept


def literal(job: Job, result: Any) -> Job:
    """The same job with the prompts that its requests had, so that none needs the answer of another."""
    prompts = {record["request"]["number"]: record["prompt"] for record in result["records"]}
    operations = [
        {
            "ask": {
                **given["ask"],
                "follows": None,
                "prompt": prompts.get(given["ask"]["number"], given["ask"]["prompt"]),
            }
        }
        if "ask" in given
        else given
        for given in job["operations"]
    ]
    return {**job, "operations": operations}


# ---------------------------------------------------------------------------------------------- all rounds


def total(rounds: Sequence[dict[str, Any]], what: str) -> Counter[str]:
    """The sum over all rounds."""
    return sum((Counter(done[what]) for done in rounds), Counter[str]())


def _report(seed: int, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seed": seed,
        "faults": sum(len(done["faults"]) for done in rounds),
        "counts": total(rounds, "counts"),
        "judged": total(rounds, "judged"),
        "tolerances": {"tie": TIE, "score": SCORE},
        "seconds": sum(done["seconds"] for done in rounds),
        "rounds": list(rounds),
    }


@dataclass(kw_only=True)
class Soak:
    """A run of many rounds."""

    shop: Shop
    right: Right
    folder: Path
    say: Callable[[str], None] = print
    shrinking: int = 16
    """Engines that are started to make a failure smaller."""

    def run(
        self,
        seed: int,
        requests: int,
        swaps: int,
        before: Sequence[dict[str, Any]] = (),
        keep: Callable[[dict[str, Any]], None] = lambda report: None,
    ) -> dict[str, Any]:
        """Rounds until so many requests and swaps were made; the report.

        Args:
            before: rounds of a report of the same seed that was interrupted; they are not run again.
            keep: gets the report behind each round.
        """
        rounds = list(before)
        while (counts := total(rounds, "counts"))["requests"] < requests or counts["swaps"] < swaps:
            left = requests - counts["requests"]
            rounds.append(self.round(f"{seed}/{len(rounds)}", min(ROUND, left) if left > 0 else ROUND))
            keep(_report(seed, rounds))
        return _report(seed, rounds)

    def round(self, seed: str, requests: int) -> dict[str, Any]:
        """One engine: its options, what was counted, and each fault with the smallest job that shows it."""
        job = job_of(self.shop, seed, requests)
        log, started = self.folder / f"engine-{seed.replace('/', '-')}.log", time.monotonic()
        result = run_job(self.shop, job, log)
        took = time.monotonic() - started
        judge = self._judge(job)
        faults = faults_of(result, judge)
        counts = counted(job, {**result, "conventional": list(self.shop.conventional)})
        self.say(
            f"round {seed}: {counts['requests']} requests, {counts['swaps']} swaps, {counts['preemptions']} "
            f"preemptions, {counts['cancelled']} cancelled, {judge.counts['ties']} ties, {len(faults)} faults, "
            f"{took:.0f} + {time.monotonic() - started - took:.0f} s"
        )
        told = [self._told(seed, job, result, fault) for fault in faults[:1]] + [vars(fault) for fault in faults[1:]]
        options = {name: value for name, value in job["engine"].items() if name not in FIXED and name != "model"}
        options["pair_from"] = job["pair_from"]
        return {
            "seed": seed,
            "options": options,
            "counts": dict(counts),
            "judged": dict(judge.counts),
            "seconds": round(time.monotonic() - started),
            "faults": told,
        }

    def _judge(self, job: Job) -> Judge:
        return Judge(self.right, UNDER_WAY if job["engine"]["async_scheduling"] else 0)

    def _told(self, seed: str, job: Job, result: Any, fault: Fault) -> dict[str, Any]:
        """A fault with the file of the smallest job that has it."""
        self.say(f"  {fault.what} (request {fault.number}); looking for the smallest job that shows it")

        def fails(candidate: Job) -> bool:
            got = run_job(self.shop, candidate, self.folder / "shrinking.log")
            again = faults_of(got, self._judge(candidate))
            return any(other.number == fault.number for other in again)

        plain = literal(job, result)
        least = smallest(plain if fails(plain) else job, fails, self.shrinking)
        file = self.folder / f"failure-{seed.replace('/', '-')}.json"
        file.write_text(json.dumps(least), encoding="utf-8")
        self.say(f"  {len(job['operations'])} operations are now {len(least['operations'])}: replay {file}")
        return {**vars(fault), "job": file.name, "operations": len(least["operations"])}
