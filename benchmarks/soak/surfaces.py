"""What becomes of an adapter wherever one can come in: ``icarus verify``, ``icarus serve``, HTTP, a watched folder."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import multiprocessing
import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.soak.malformed import CONVENTIONAL, Case, Outcome
from icarus.bench.agents.server import Server, free_port

CPU_SECONDS = 30.0
"""Of the processor, which a command may take."""

PATIENCE_SECONDS = 600.0
"""After which a command or a load counts as one that hangs, on a machine that has other things to do."""

MEGABYTES = 1500
"""Memory that a command may take more than before it looked at an adapter."""

MOST_MEMORY = 12 << 30
"""Bytes that a command or a process of a server can have, so that it ends before the machine does."""

LONGEST, MOST_LINES = 1000, 200
"""Characters of a sentence that somebody reads; lines of ``icarus verify``, which has one for each problem."""

REFUSED, SERVED, MUTE, BROKEN = "refused", "served", "mute", "broken"
"""MUTE: it was loaded, and a request of its own is refused."""


@dataclass(frozen=True)
class Seen:
    """What one way in made of one adapter."""

    outcome: str
    said: str
    seconds: float
    """Of the processor for a command, of a clock for a server."""


def fault(case: Case, seen: Seen, way: str) -> str:
    """What is wrong with what was seen; empty if it is as expected."""
    if seen.outcome == BROKEN:
        return f"{way}: {seen.said}"
    if seen.seconds > (CPU_SECONDS if way in ("verify", "start") else PATIENCE_SECONDS):
        return f"{way}: took {seen.seconds:.0f} s"
    wanted = _wanted(case, way)
    if seen.outcome == MUTE and case.expected is not Outcome.HARMLESS:
        return f"{way}: loaded, and then {seen.said}"
    if wanted and seen.outcome != wanted:
        return f"{way}: {seen.outcome} and not {wanted} ({seen.said[:300]})"
    if seen.outcome == REFUSED:
        if said := _unreadable(seen.said):
            return f"{way}: {said} ({seen.said[:300]!r})"
        if (
            way == "verify"
            and (servable := _servable(case)) is not None
            and ("it can be served" in seen.said) != servable
        ):
            return f"{way}: whether it can be served is told wrongly ({seen.said[:300]})"
        if wanted and not re.search(case.says, seen.said):
            return f"{way}: the sentence does not say {case.says!r} ({seen.said[:300]})"
    return ""


def _wanted(case: Case, way: str) -> str:
    """The outcome that is right; empty where both are."""
    if way == "verify":  # which answers whether the cache may be shared
        if case.kind == CONVENTIONAL or case.expected is Outcome.CONVENTIONAL:
            return REFUSED
    elif case.expected is Outcome.CONVENTIONAL:
        return SERVED
    return {Outcome.REFUSED: REFUSED, Outcome.SERVED: SERVED}.get(case.expected, "")


def _servable(case: Case) -> bool | None:
    """Whether ``icarus verify`` is to say that it can be served, though it may not share; None where both are right."""
    if case.expected is Outcome.REFUSED:
        return False
    plain = case.kind == CONVENTIONAL and case.expected is Outcome.SERVED
    return True if plain or case.expected is Outcome.CONVENTIONAL else None


def _unreadable(said: str) -> str:
    if not said.strip():
        return "no sentence"
    if "Traceback" in said or "run with --debug" in said:
        return "a traceback, or an error that nobody foresaw"
    lines = said.splitlines()
    if len(lines) > MOST_LINES or max(map(len, lines)) > LONGEST:
        return f"{len(lines)} lines, the longest of {max(map(len, lines))} characters"
    if any(not character.isprintable() for character in said.replace("\n", "")):
        return "characters that a terminal obeys"
    return ""


# ---------------------------------------------------------------------------------------------- commands


def verify(folder: Path, base: Path) -> Seen:
    """``icarus verify FOLDER --base BASE``."""
    status, said, seconds, problem = _command(["verify", str(folder), "--base", str(base)])
    if problem or status not in (0, 1, 2):
        return Seen(BROKEN, problem or f"exit status {status}: {said[-300:]}", seconds)
    return Seen(REFUSED if status else SERVED, said, seconds)


def plan(folder: Path, base: Path) -> Seen:
    """``icarus serve BASE --adapters x=FOLDER``, up to where vLLM would take over."""
    words = ["serve", str(base), "--adapters", f"x={folder}", "--port", str(free_port())]
    status, said, seconds, problem = _command(words)
    if problem or status not in (0, 2):
        return Seen(BROKEN, problem or f"exit status {status}: {said[-300:]}", seconds)
    lines = said.strip().splitlines()
    if status and len(lines) != 1:
        return Seen(BROKEN, f"{len(lines)} lines: {said[-300:]}", seconds)
    return Seen(REFUSED if status else SERVED, said, seconds)


_NEEDED = ("icarus.cli", "icarus.verify", "icarus.vllm.server.serve", "vllm.entrypoints.openai")


def _command(words: Sequence[str]) -> tuple[int | None, str, float, str]:
    """Exit status, output, CPU seconds, and what went wrong; in a child, which may hang or take all memory."""
    for module in _NEEDED:  # here, and not in each child
        importlib.import_module(module)
    context: Any = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(list(words), theirs))
    child.start()
    theirs.close()
    try:
        answered = mine.poll(PATIENCE_SECONDS)
        status, said, seconds, memory = mine.recv() if answered else (None, "", PATIENCE_SECONDS, 0)
    except EOFError:
        child.join()
        return None, "", 0.0, f"it ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()
    if not answered:
        return None, "", seconds, f"it hung for {PATIENCE_SECONDS:.0f} s"
    problem = f"it took {memory:.0f} MB" if memory > MEGABYTES else ""
    return status, said, seconds, problem


def _run(words: list[str], answer: Any) -> None:
    import torch

    from icarus import cli
    from icarus.vllm.server import serve

    torch.set_num_threads(1)  # OpenMP's threads did not come along
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    assert hasattr(serve, "_start_vllm"), "what is left out here has another name now"
    serve._start_vllm = lambda words: None
    before, worked = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True)  # as a terminal's
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status: int | None = cli.main(words)
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException as error:
            status = None
            output.write(f"{type(error).__name__} escaped: {error}"[:500])
    said = output.buffer.getvalue().decode()
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    answer.send((status, said, time.process_time() - worked, more))
    answer.close()
    os._exit(0)


# ---------------------------------------------------------------------------------------------- a running server


class Running:
    """A server with the adapters that are sound, and ways to try others."""

    FLAGS = (
        "--served-model-name base --host 127.0.0.1 --dtype float32 --enforce-eager --generation-config vllm "
        "--block-size 32 --max-model-len 256 --max-num-seqs 8 --max-num-queued-reqs 64 --seed 0"
    ).split()
    """Flags of vLLM for a tiny model."""

    def __init__(self, server: Server, base: str, steady: str, prompt: list[int]) -> None:
        """
        Args:
            base: the name of the base model.
            steady: the name of an adapter that is sound and stays.
            prompt: token ids that are asked for again and again.
        """
        self.server, self._prompt, self._models = server, prompt, (base, steady)
        self.http = httpx.Client(base_url=server.url, timeout=PATIENCE_SECONDS)
        self._right = [self.tokens(name) for name in self._models]

    def tokens(self, model: str) -> list[int]:
        """Greedy tokens of the steady prompt; raises where the answer is no 200 or not finite."""
        reply = self.http.post(
            "/v1/completions",
            json={
                "model": model,
                "prompt": self._prompt,
                "max_tokens": 8,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 1,
                "return_token_ids": True,
            },
        )
        if reply.status_code != 200:
            raise httpx.HTTPStatusError(reply.text[:300], request=reply.request, response=reply)
        [choice] = reply.json()["choices"]
        if not all(math.isfinite(value) for value in choice["logprobs"]["token_logprobs"]):
            raise ValueError(f"log-probabilities are not finite: {choice['logprobs']['token_logprobs']}")
        return list(choice["token_ids"])

    def disturbed(self) -> str:
        """What is wrong with the server now; empty where base model and steady adapter answer as they did at first."""
        for last in (False, True):
            try:
                self.server.check()
                got = [self.tokens(name) for name in self._models]
                return "" if got == self._right else "the server answers wrongly afterwards"
            except httpx.ReadError as error:  # a connection that was closed behind an answer
                if last:
                    return f"the server is not well afterwards ({error})"
            except Exception as error:
                return f"the server is not well afterwards ({type(error).__name__}: {error})"
        raise AssertionError("it returns above")

    def load(self, name: str, folder: Path) -> Seen:
        """``/v1/load_lora_adapter``, and a request where it succeeds."""
        started = time.monotonic()
        try:
            reply = self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        except httpx.HTTPError as error:
            return Seen(BROKEN, f"{type(error).__name__} at loading", time.monotonic() - started)
        seconds = time.monotonic() - started
        if reply.status_code == 200:
            seen = self._asked(name, seconds)
            with contextlib.suppress(httpx.HTTPError):
                self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            return seen
        said = _message(reply)
        if not 400 <= reply.status_code < 500:
            return Seen(BROKEN, f"{reply.status_code}: {said[:300]}", seconds)
        return Seen(REFUSED, said, seconds)

    def _asked(self, name: str, seconds: float) -> Seen:
        try:
            self.tokens(name)
        except httpx.HTTPStatusError as error:
            refused = 400 <= error.response.status_code < 500
            return Seen(MUTE if refused else BROKEN, f"{error.response.status_code}: {error}", seconds)
        except Exception as error:
            return Seen(BROKEN, f"loaded, and then {type(error).__name__}: {error}", seconds)
        return Seen(SERVED, "", seconds)

    def watched(self, folders: Sequence[Path], patience: float) -> dict[str, Seen]:
        """What becomes of adapters that were moved into the watched folder, by the names of their folders.

        Those of which nothing is heard are left out.
        """
        started, seen = time.monotonic(), dict[str, Seen]()
        while len(seen) < len(folders) and time.monotonic() - started < patience:
            time.sleep(1)
            log = self.server.log.read_text(encoding="utf-8", errors="replace")
            try:
                listed = {card["id"] for card in self.http.get("/v1/models").json()["data"]}
            except (httpx.HTTPError, ValueError, KeyError):  # it hangs, or is gone
                return seen
            for folder in folders:
                if folder.name in seen:
                    continue
                if folder.name in listed:
                    seen[folder.name] = self._asked(folder.name, 0.0)
                elif told := re.search(rf"Not loaded (?:yet )?from {re.escape(str(folder))}: (.*)", log):
                    seen[folder.name] = Seen(BROKEN if " yet from " in told[0] else REFUSED, told[1], 0.0)
        return seen


def _message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text


@contextlib.contextmanager
def running(base: Path, adapters: Sequence[str], folder: Path, *more: str, steady: str = "") -> Iterator[Running]:
    """A server of the tiny model. ``adapters`` are NAME=PATH; a client may load from anywhere below ``folder``."""
    port = free_port()
    words = ["prlimit", f"--data={MOST_MEMORY}", sys.executable, "-m", "icarus.cli", "serve", str(base)]
    words += ["--adapters", *adapters]
    words += ["--allow-adapters-from", str(folder), "--port", str(port), *Running.FLAGS, *more]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with Server(words, variables, port, folder / "server.log", 900) as server:
        yield Running(server, "base", steady or adapters[0].partition("=")[0], list(range(10, 60)))
