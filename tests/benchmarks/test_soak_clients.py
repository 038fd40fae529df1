"""The clients of the real model's soak, against a server that answers by arithmetic."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from arithmetic import Arithmetic, Speaker
from benchmarks.soak import real, shop
from benchmarks.soak.judge import Judge
from benchmarks.soak.mix import Mix

SHOP = shop.Shop(
    base=Path("base"),
    specialists={name: [Path(f"{name}-{version}") for version in range(3)] for name in ("sql", "chat")},
    conventional={"plain": [Path(f"plain-{version}") for version in range(3)]},
)


def test_clients_do_a_mix_and_each_answer_is_written_down() -> None:
    """Against a server that answers by arithmetic: streams, whole answers, scores, hang-ups, swaps."""
    operations = Mix("clients", list(SHOP.specialists), ["plain"], draw=shop.any_tokens).operations(60)
    with answering() as (url, asked):
        clients = real.Clients(url, SHOP)
        asyncio.run(clients.run([operation for operation in operations if "step" not in operation]))
    report = judged(clients)
    assert report["failed"] == []
    assert report["counts"]["requests"] == 60
    replaced = report["counts"]["swaps"] + report["counts"]["reloads"]
    assert (
        replaced
        == sum(not {"swap", "reload"}.isdisjoint(operation) for operation in operations)
        == asked["load_inplace"]
    )
    assert min(report["counts"][count] for count in ("streamed", "scored", "cancelled", "preemptions")) > 0
    assert report["judged"]["scores"] > 100


def test_a_server_that_answers_wrongly_or_not_is_found() -> None:
    operations = [{"ask": {"number": n, "model": "base", "prompt": [5, 6, 7], "max_tokens": 4}} for n in range(4)]
    with answering(wrong=1, broken=2) as (url, _):
        clients = real.Clients(url, SHOP)
        asyncio.run(clients.run(operations))
    failed = judged(clients)["failed"]
    assert sum("500" in said for said in failed) == 1
    assert sum("token 0 is" in said for said in failed) == 1
    assert sum("lost" in said for said in failed) == 1, "the one that was answered with 500"
    assert len(failed) == 3


def judged(clients: real.Clients) -> dict[str, Any]:
    answers = json.loads(json.dumps(clients.answers({"preemptions": 3}) | {"seconds": 1}))
    return real.report(SHOP, answers, Judge(AnyVersion()))


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the answers of a part, and from what came of comparing one."""
    served: list[str] = []

    def serve(shop: Any, tokenizer: Any, folder: Path, requests: int, seed: str) -> dict[str, Any]:
        served.append(seed)
        return {"counts": {"swaps": requests}, "faults": ["lost"], "records": [], "seconds": 7}

    def interrupted() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "serve", serve)
    monkeypatch.setattr(real, "PART", 4)
    with pytest.raises(KeyboardInterrupt):
        real.run(SHOP, interrupted, None, tmp_path, 10, 3)
    for _ in range(2):
        report = real.run(SHOP, AnyVersion, None, tmp_path, 10, 3)
        assert served == ["3/0", "3/1", "3/2"]
        assert report["failed"] == ["part 0, lost", "part 1, lost", "part 2, lost"]
        assert (report["faults"], report["seconds"], report["counts"]["swaps"]) == (3, 21, 10)
    with pytest.raises(SystemExit, match="another folder"):
        real.run(SHOP, AnyVersion, None, tmp_path, 10, 4)


class AnyVersion(Arithmetic):
    """Weights that are all alike, as nobody outside knows which were in force."""

    def answer(self, speaker: Speaker, prompt: list[int], count: int) -> list[int]:
        return super().answer(("", 0), prompt, count)

    def scores(self, speaker: Speaker, prompt: list[int]) -> list[float]:
        return super().scores(("", 0), prompt)


@contextmanager
def answering(wrong: int = -1, broken: int = -1) -> Iterator[tuple[str, Counter[str]]]:
    """A server of ``AnyVersion``; of completions the ones with these numbers are wrong, or 500."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "lora_name" in body:
                asked["load_inplace"] += body.get("load_inplace", False) and self.path.startswith("/v1/load")
                self.reply(200, b"Success")
                return
            asked["completions"] += 1
            number = asked["completions"] - 1
            tokens = AnyVersion().answer(("", 0), body["prompt"], body["max_tokens"])
            tokens[0] += number == wrong
            if number == broken:
                self.reply(500, b"{}")
            elif body.get("stream"):
                events = [{"choices": [{"token_ids": [token], "finish_reason": None}]} for token in tokens]
                events[-1]["choices"][0]["finish_reason"] = "length"
                self.reply(200, b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events))
            else:
                scores = AnyVersion().scores(("", 0), body["prompt"])
                told = [{str(t): {"logprob": s}} for t, s in zip(body["prompt"][1:], scores, strict=True)]
                choice = {"token_ids": tokens, "finish_reason": "length", "prompt_logprobs": [None, *told]}
                self.reply(200, json.dumps({"choices": [choice]}).encode())

        def reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):  # who hung up
                self.wfile.write(content)

        def log_message(self, *told: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
