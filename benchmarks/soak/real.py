"""The packaged small model behind ``icarus serve`` under random load, compared with contexts.

Clients stream, hang up, follow one another, and ask for scores, while specialists are replaced, reloaded and unloaded
over HTTP. Which weights a token is of cannot be known from outside to the step, so an answer that ran across a swap may
change from the old version to the new one at any token, once.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak.judge import Judge, Right
from benchmarks.soak.mix import BASE, Mix, Operation, Request
from benchmarks.soak.record import Record
from benchmarks.soak.shop import Shop
from icarus import arguments
from icarus.bench.agents.server import Server, free_port

AT_ONCE = 8
"""Requests that clients have open."""

PART = 100
"""Requests to one server, so that little is lost where a run is interrupted."""

STEP_SECONDS = 0.03
START_SECONDS, PATIENCE_SECONDS = 1800, 1800
"""How long a start and an answer may take: the machine may be busy with other things."""

FLAGS = (
    "--served-model-name base --host 127.0.0.1 --dtype float32 --enforce-eager --generation-config vllm --seed 0 "
    "--block-size 32 --max-model-len 512 --max-num-seqs 6 --max-num-batched-tokens 64 --num-gpu-blocks-override 24 "
    "--max-loras 2 --max-cpu-loras 3"
).split()
TEXTS = ("docs/method.md", "docs/serve.md", "docs/train.md", "README.md")
"""What prompts are taken from, in the checkout."""

Say = Callable[[str], None]


def run(
    shop: Shop, right: Callable[[], Right], tokenizer: Any, folder: Path, requests: int, seed: int, say: Say = print
) -> dict[str, Any]:
    """So many requests, a part of them to each of several servers; the report.

    What was answered and what came of comparing it is kept in ``folder``, and an interrupted run goes on from there.
    """
    answers, reports = [], []
    for first in range(0, requests, PART):
        asked: dict[str, Any] = {"requests": min(PART, requests - first), "seed": f"{seed}/{first // PART}"}
        ask = partial(serve, shop, tokenizer, folder, **asked)
        answers.append(_kept(folder / f"answers-{first}.json", asked, ask))
        say(f"{first + PART} requests served")
    for number, part in enumerate(answers):
        compare = partial(_compared, shop, right, part)
        reports.append(_kept(folder / f"report-{number * PART}.json", part["asked"], compare))
        say(f"{(number + 1) * PART} compared, {len(reports[-1]['failed'])} faults in the last {PART}")
    return together(reports, seed)


def _kept(file: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file has, or what is made and put there; ``asked`` says of what."""
    if not file.exists():
        arguments.write_json({"asked": asked, **make()}, str(file))
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if kept["asked"] != asked:
        raise SystemExit(f"{file} is of {kept['asked']}; name another folder.")
    return kept


def _compared(shop: Shop, right: Callable[[], Right], answers: dict[str, Any]) -> dict[str, Any]:
    return report(shop, answers, Judge(right()))


def serve(shop: Shop, tokenizer: Any, folder: Path, requests: int, seed: str) -> dict[str, Any]:
    """So many requests to one server; what became of each."""
    draw = windows(tokenizer)
    operations = Mix(seed, list(shop.specialists), list(shop.conventional), draw=draw).operations(requests)
    port, started = free_port(), time.monotonic()
    words = [sys.executable, "-m", "icarus.cli", "serve", str(shop.base), "--adapters"]
    words += [f"{name}={folders[0]}" for name, folders in {**shop.specialists, **shop.conventional}.items()]
    roots = {folders[0].parent for folders in shop.specialists.values()}
    words += [word for root in roots for word in ("--allow-adapters-from", str(root))]
    words += ["--port", str(port), *FLAGS]
    with Server(words, {"VLLM_CPU_KVCACHE_SPACE": "2"}, port, folder / "server.log", START_SECONDS) as server:
        clients = Clients(server.url, shop)
        asyncio.run(clients.run(operations))
        counts = {"preemptions": preempted(server.url)}
    return clients.answers(counts) | {"seconds": round(time.monotonic() - started)}


def windows(tokenizer: Any) -> Callable[[random.Random, int], list[int]]:
    """Pieces of the project's own pages."""
    root = Path(__file__).parents[2]
    text = "\n".join((root / page).read_text(encoding="utf-8") for page in TEXTS)
    tokens: list[int] = list(tokenizer(text)["input_ids"])

    def draw(rng: random.Random, count: int) -> list[int]:
        start = rng.randrange(len(tokens) - count)
        return tokens[start : start + count]

    return draw


class Clients:
    """Does the operations of a mix over HTTP."""

    def __init__(self, url: str, shop: Shop) -> None:
        self.records: dict[int, Record] = {}
        self.swaps = self.renewals = self.reloads = 0
        self.faults: list[str] = []
        self._shop, self._url = shop, url
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._names = {name: name for name in [*shop.specialists, *shop.conventional]}
        self._versions: dict[str, list[int]] = {name: [0] for name in self._names}  # two while a swap is under way
        self._room = asyncio.Semaphore(AT_ONCE)
        self._http: Any = None

    async def run(self, operations: list[Operation]) -> None:
        """All of them, and to the end of the last request."""
        actions: dict[str, Callable[[Any], Awaitable[None]]] = {
            "ask": lambda given: self._ask(Request(**given)),
            "step": lambda count: asyncio.sleep(STEP_SECONDS * count),
            "cancel": self._cancel,
            "quiet": self._quiet,
            "swap": lambda given: self._swap(*given),
            "renew": lambda given: self._renew(*given),
            "reload": lambda name: self._swap(name, self._versions[name][-1], again=True),
        }
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE_SECONDS) as self._http:
            for operation in operations:
                [(action, given)] = operation.items()
                await actions[action](given)
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def answers(self, counts: dict[str, int]) -> dict[str, Any]:
        """All there is to judge; ``counts`` are those of the server."""
        changes = {"swaps": self.swaps, "renewals": self.renewals, "reloads": self.reloads}
        records = [record.as_json() for record in self.records.values()]
        return {"counts": counts | changes, "faults": self.faults, "records": records}

    async def _ask(self, request: Request) -> None:
        await self._room.acquire()
        before = self.records.get(request.follows) if request.follows is not None else None
        prompt = [*before.prompt, *before.tokens, *request.prompt] if before else request.prompt
        named = request.model != BASE
        record = Record(request, prompt, list(self._versions[request.model]) if named else [0])
        self.records[request.number] = record
        name = self._names[request.model] if named else BASE
        self._tasks[request.number] = asyncio.create_task(self._answer(record, name))

    async def _answer(self, record: Record, name: str) -> None:
        body = {"model": name, "prompt": record.prompt, "max_tokens": record.request.max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        try:
            if record.request.streamed and not record.request.scored:  # vLLM scores no prompts in streams
                await self._stream(record, {**body, "stream": True})
            else:
                await self._whole(record, {**body, "prompt_logprobs": 0 if record.request.scored else None})
        except httpx.HTTPError as error:
            self.faults.append(f"request {record.request.number}: {type(error).__name__}: {error}")
        finally:
            self._room.release()

    async def _stream(self, record: Record, body: dict[str, Any]) -> None:
        async with self._http.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    told = json.loads(line[6:])
                    for choice in told.get("choices", ()):
                        record.tokens += choice["token_ids"] or []
                        record.finished = choice["finish_reason"] or record.finished
                    if "error" in told:
                        self.faults.append(f"request {record.request.number}: {line[:300]}")

    async def _whole(self, record: Record, body: dict[str, Any]) -> None:
        reply = await self._http.post("/v1/completions", json=body)
        if reply.status_code != 200:
            self.faults.append(f"request {record.request.number}: {reply.status_code} {reply.text[:300]}")
            return
        [choice] = reply.json()["choices"]
        record.tokens, record.finished = choice["token_ids"], choice["finish_reason"]
        if record.request.scored and len(record.prompt) > 1:
            scored = zip(record.prompt[1:], choice["prompt_logprobs"][1:], strict=True)
            record.scores = [at[str(token)]["logprob"] for token, at in scored]

    async def _cancel(self, number: int) -> None:
        record = self.records[number]
        if record.open:
            record.cancelled = True
            self._tasks[number].cancel()

    async def _quiet(self, name: str) -> None:
        numbers = [number for number, record in self.records.items() if record.request.model == name]
        await asyncio.gather(*(self._tasks[number] for number in numbers), return_exceptions=True)

    async def _swap(self, name: str, version: int, again: bool = False) -> None:
        self._versions[name] = [self._versions[name][-1], version]
        for record in self.records.values():
            if record.open and record.request.model == name:
                record.versions.append(version)
        if await self._load(name, version, load_inplace=True):
            self.swaps += not again
            self.reloads += again
        self._versions[name] = [version]

    async def _renew(self, name: str, version: int) -> None:
        reply = await self._http.post("/v1/unload_lora_adapter", json={"lora_name": self._names[name]})
        if reply.status_code != 200:
            self.faults.append(f"{name} was not unloaded: {reply.status_code} {reply.text[:300]}")
        self.renewals += 1
        if name in self._shop.conventional:  # its own name is in the keys of the cache
            self._names[name] = f"{name}-renewed-{self.renewals}"
        self._versions[name] = [version]
        await self._load(name, version)

    async def _load(self, name: str, version: int, **options: bool) -> bool:
        body = {"lora_name": self._names[name], "lora_path": str(self._shop.folder(name, version)), **options}
        reply = await self._http.post("/v1/load_lora_adapter", json=body)
        if reply.status_code != 200:
            self.faults.append(f"{name} was not loaded: {reply.status_code} {reply.text[:300]}")
        return bool(reply.status_code == 200)


def preempted(url: str) -> int:
    """Preemptions that a server counts."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return int(sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total"))


def report(shop: Shop, answers: dict[str, Any], judge: Judge) -> dict[str, Any]:
    """What was asked and done, and all that is wrong with the ``Clients.answers``."""
    faults = list(answers["faults"])
    counts: Counter[str] = Counter(answers["counts"])
    for record in answers["records"]:
        request = record["request"]
        counts.update(["requests", _kind(shop, request["model"])])
        known = {
            "streamed": request["streamed"],
            "scored": request["scored"],
            "following": request["follows"] is not None,
            "cancelled": record["cancelled"],
            "swapped_while_open": len(record["versions"]) > 1,
        }
        counts.update(name for name, holds in known.items() if holds)
        if what := judge.fault(record):
            faults.append(f"request {request['number']}: {what}")
    return {
        "counts": dict(counts),
        "judged": dict(judge.counts),
        "seconds": answers["seconds"],
        "failed": faults,
    }


def together(reports: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """One report of those of all parts."""
    sums = {kind: dict(sum((Counter(part[kind]) for part in reports), Counter())) for kind in ("counts", "judged")}
    failed = [f"part {number}, {fault}" for number, part in enumerate(reports) for fault in part["failed"]]
    seconds = sum(part["seconds"] for part in reports)
    return {"faults": len(failed), "seed": seed, "parts": len(reports), **sums, "seconds": seconds, "failed": failed}


def _kind(shop: Shop, model: str) -> str:
    """Of a model: the base model, an ICaRus adapter or a conventional one."""
    return BASE if model == BASE else "conventional" if model in shop.conventional else "icarus"
