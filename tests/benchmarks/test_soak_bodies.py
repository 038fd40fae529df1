"""Malformed requests: how the document is steered, how what was sent is read, and who is to blame for a 500."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import bodies, shop
from benchmarks.soak.bodies import Sent

SHOP = shop.Shop(
    base=Path("base"),
    specialists={name: [Path(f"{name}-0")] for name in ("sql", "chat")},
    conventional={"plain": [Path("plain-0")]},
)
FULL = bodies.DOCUMENTED


def sent(path: str = "/v1/completions", status: int = 500, said: str = "broken") -> Sent:
    return Sent(method="POST", path=path, body="{}", media="application/json", status=status, said=said)


def test_the_document_names_the_models_that_there_are() -> None:
    fields = {"model": {"type": "string"}, "max_tokens": {"type": "integer"}, "prompt": {"type": "string"}}
    loading = {"lora_name": {"type": "string"}, "lora_path": {"type": "string"}}
    schemas = {
        "Completion": {"properties": fields, "required": ["prompt"]},
        "Load": {"properties": loading},
        "Empty": {"type": "object"},
    }
    document: dict[str, Any] = {"components": {"schemas": schemas}}
    steered = bodies.steered(document, SHOP)["components"]["schemas"]
    assert steered["Completion"]["required"] == ["model", "prompt"]
    assert "sql" in steered["Completion"]["properties"]["model"]["enum"]
    assert steered["Completion"]["properties"]["max_tokens"]["maximum"] == 4
    assert "sql" not in steered["Load"]["properties"]["lora_name"]["enum"], "it is asked for to the end"
    assert "chat-0" in steered["Load"]["properties"]["lora_path"]["enum"]
    assert document["components"]["schemas"]["Completion"]["properties"] == fields, "the document is left as it was"


def test_what_was_sent_is_read() -> None:
    entry = {
        "request": {"method": "POST", "url": "http://here/v1/load?x=1", "postData": {"text": "{", "mimeType": "a/b"}},
        "response": {"status": 500, "content": {"text": "no"}},
    }
    assert bodies._read(entry, "http://here") == Sent("POST", "/v1/load?x=1", "{", "a/b", 500, "no")
    bare = {"request": {"method": "GET", "url": "http://here/x"}, "response": {"status": 0}}
    assert bodies._read(bare, "http://here") == Sent("GET", "/x", "", "", 0, "")


def test_what_was_too_slow_is_asked_again_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(bodies, "_status", lambda server, request, timeout_s: asked.append(timeout_s) or 200)
    server: Any = None
    assert bodies.answered(server, sent(status=0)).status == 200
    assert bodies.answered(server, sent(status=500)).status == 500
    assert asked == [bodies.PATIENCE_SECONDS]


def test_a_500_is_ours_where_stock_has_none() -> None:
    failed = [sent(), sent(), sent("/v1/chat"), sent(status=0, said="")]
    first = [failed[0], failed[2], failed[3]]
    told = bodies.report(failed, first, [500, 400, 0], {"published 500": 3}, "")
    assert told["faults"] == 1
    assert [row["times"] for row in told["failed"]] == [2, 1, 1]
    assert [row["ours"] for row in told["failed"]] == [False, True, False]
    assert bodies.report([], [], [], {}, "it died")["faults"] == 1


def test_sorts_differ_in_the_path_and_the_message_and_not_in_the_query() -> None:
    assert sent("/a?x=1").sort == sent("/a?x=2").sort
    assert len({sent(path).sort for path in ("/a", "/b")} | {sent("/a", said="other").sort}) == 3


def test_what_failed_is_500_or_no_answer_but_not_a_full_queue() -> None:
    statuses = (200, 400, 404, 500, 501, FULL, 0)
    assert [request.status for request in bodies.failures([sent(status=status) for status in statuses])] == [
        500,
        501,
        0,
    ]
