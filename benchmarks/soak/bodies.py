"""Malformed requests to ``icarus serve`` from schemathesis, which reads vLLM's OpenAPI document; and to stock vLLM.

schemathesis is a command of its own environment (``pip install schemathesis``). It is run on the document as vLLM
publishes it, and once more on one that names the models and the folders that there are, so that requests get as far as
the models. What is answered with 500 or not at all is asked of a stock vLLM with the same flags.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.soak.shop import Shop
from benchmarks.soak.surfaces import PATIENCE_SECONDS, Running, running
from icarus.bench.agents.server import Server, ServerFailed, free_port

DOCUMENTED = 503
"""A full queue."""

SLOW_SECONDS = 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sent:
    """One request of schemathesis and its answer."""

    method: str
    path: str
    body: str
    media: str
    status: int  # 0: no answer
    said: str

    @property
    def sort(self) -> tuple[str, str, int, str]:
        """Requests of one sort fail for one reason."""
        return self.method, self.path.split("?")[0], self.status, self.said[:60]


def run(shop: Shop, command: str, folder: Path, seconds: int, seed: int, say: Say = print) -> dict[str, Any]:
    """Both runs; the report."""
    adapters = [f"{name}={shop.folder(name, 0)}" for name in ("sql", "plain")]
    counts: Counter[str] = Counter()
    failed: list[Sent] = []
    with running(shop.base, adapters, folder) as server:
        published = server.http.get("/openapi.json").json()
        for name, document in (("published", published), ("steered", steered(published, shop))):
            sent = _sent(command, server.server.url, document, folder / name, seconds, seed)
            sent = [answered(server.server, request) for request in sent]
            counts.update(f"{name} {request.status}" for request in sent)
            failed += failures(sent)
            say(f"{name}: {len(sent)} requests, {server.disturbed() or 'the server is well'}")
        disturbed = server.disturbed()
    first = list({request.sort: request for request in failed}.values())
    stock = _of_stock(shop, first, folder) if first else []
    return report(failed, first, stock, counts, disturbed)


def answered(server: Server, request: Sent) -> Sent:
    """The same; asked again where no answer came in time, which a long one needs on a machine that has other work."""
    return request if request.status else replace(request, status=_status(server, request, PATIENCE_SECONDS))


def failures(sent: Sequence[Sent]) -> list[Sent]:
    """Those that were not answered, or with an error of the server that is not documented."""
    return [
        request for request in sent if not request.status or (request.status >= 500 and request.status != DOCUMENTED)
    ]


def report(
    failed: Sequence[Sent], first: Sequence[Sent], stock: Sequence[int], statuses: Mapping[str, int], disturbed: str
) -> dict[str, Any]:
    """What failed, and the first of each sort with the status of stock vLLM; ours is what stock answers otherwise."""
    rows: list[dict[str, Any]] = []
    for request, status in zip(first, stock, strict=True):
        row = {**vars(request), "body": request.body[:2000], "stock": status, "times": _times(request, failed)}
        rows.append({**row, "ours": bool(status) and status < 500})
    return {
        "faults": sum(row["ours"] for row in rows) + bool(disturbed),
        "disturbed": disturbed,
        "statuses": dict(sorted(statuses.items())),
        "failed": rows,
    }


def _times(request: Sent, failed: Sequence[Sent]) -> int:
    return sum(other.sort == request.sort for other in failed)


def steered(document: Mapping[str, Any], shop: Shop) -> dict[str, Any]:
    """The document with the models and folders that there are, and answers of few tokens."""
    copied: dict[str, Any] = json.loads(json.dumps(document))
    known: dict[str, Any] = {
        "model": {"type": "string", "enum": ["base", "sql", "plain"]},
        "lora_name": {"type": "string", "enum": ["plain", "base", "late", "text", "a/b", "\n"]},
        "lora_path": {"type": "string", "enum": [str(shop.folder("chat", 0)), str(shop.base), "/nowhere", "~", ""]},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
        "max_output_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
    }
    for schema in copied["components"]["schemas"].values():
        fields = schema.get("properties", {})
        for name in fields.keys() & known.keys():
            fields[name] = known[name]
        if "model" in fields:
            schema["required"] = sorted({*schema.get("required", ()), "model"})
    return copied


def _sent(command: str, url: str, document: Any, folder: Path, seconds: int, seed: int) -> list[Sent]:
    """What schemathesis sent in so many seconds."""
    folder.mkdir(parents=True)
    schema, report = folder / "openapi.json", folder / "requests.har"
    schema.write_text(json.dumps(document), encoding="utf-8")
    words = [command, "run", str(schema), "--url", url, "--seed", str(seed), "--checks", "not_a_server_error"]
    words += ["--max-time", str(seconds), "--request-timeout", str(SLOW_SECONDS), "--no-shrink", "--no-color"]
    words += ["--continue-on-failure", "--generation-database", "none", "--suppress-health-check", "all"]
    words += ["--phases", "coverage,fuzzing", "--report", "har", "--report-har-path", str(report)]
    with (folder / "schemathesis.log").open("w", encoding="utf-8") as log:
        subprocess.run(words, stdout=log, stderr=log, timeout=2 * seconds + 300)
    entries = json.loads(report.read_text(encoding="utf-8"))["log"]["entries"]
    return [_read(entry, url) for entry in entries]


def _read(entry: Mapping[str, Any], url: str) -> Sent:
    asked, answered = entry["request"], entry["response"]
    posted = asked.get("postData", {})
    return Sent(
        method=asked["method"],
        path=asked["url"].removeprefix(url),
        body=posted.get("text", ""),
        media=posted.get("mimeType", ""),
        status=answered["status"],
        said=answered.get("content", {}).get("text", "")[:300],
    )


def _of_stock(shop: Shop, requests: Sequence[Sent], folder: Path) -> list[int]:
    """The status that stock vLLM answers each request with; 0 for none. A server that one ends is started anew."""
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(shop.base)]
    words += ["--enable-lora", "--lora-modules", *(f"{name}={shop.folder(name, 0)}" for name in ("sql", "plain"))]
    words += ["--max-lora-rank", "8", "--max-loras", "8", "--enable-prompt-tokens-details", *Running.FLAGS]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    statuses: list[int] = []
    while len(statuses) < len(requests):
        port = free_port()
        with Server([*words, "--port", str(port)], variables, port, folder / "stock.log", 900) as server:
            for request in requests[len(statuses) :]:
                statuses.append(_status(server, request, PATIENCE_SECONDS))
                if not statuses[-1] and not _alive(server):
                    break
    return statuses


def _status(server: Server, request: Sent, timeout_s: float) -> int:
    try:
        reply = httpx.request(
            request.method,
            server.url + request.path,
            content=request.body.encode("utf-8", "surrogateescape"),
            headers={"Content-Type": request.media or "application/json"},
            timeout=timeout_s,
        )
    except httpx.HTTPError:
        return 0
    return reply.status_code


def _alive(server: Server) -> bool:
    """Whether a server answers yet, a little after something went wrong."""
    try:
        server.check(timeout_s=2)
        return httpx.get(f"{server.url}/health", timeout=SLOW_SECONDS).status_code == 200
    except (ServerFailed, httpx.HTTPError):
        return False
