"""One server with two engines: each has a cache of its own, and every load reaches both."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines import NEW, Asked, prompts
from http_server import Server, serving
from strict_skips import needs_vllm

pytestmark = [pytest.mark.engine, needs_vllm]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    two = ("--data-parallel-size", "2")
    with serving(tmp_path_factory.mktemp("shop"), *two, VLLM_CPU_OMP_THREADS_BIND="0|1") as running:
        yield running


def check(server: Server, asked: list[Asked], models: dict[str, str]) -> None:
    """All at once, so that both engines are asked. ``models``: whose tokens a name must give."""
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda one: server.ask(*one, max_tokens=NEW)[0], asked))
    for (model, prompt), got in zip(asked, replies, strict=True):
        assert got == server.shop.reference(models[model], prompt), (model, len(prompt))


def test_two_engines(server: Server) -> None:
    same = {model: model for model in ("base", "sql", "chat")}
    check(server, [(model, prompt) for prompt in prompts(0) for model in same], same)
    reply = server.load("sql", server.shop.folder / "chat", load_inplace=True)
    assert reply.status_code == 200, reply.text
    check(server, [("sql", prompt) for prompt in prompts(0)], {"sql": "chat"})
    for engine in ("0", "1"):
        assert server.metric("icarus:decoder_rows_total", engine=engine) > 0
        assert server.metric("icarus:adapter_swaps_total", engine=engine, adapter="sql") == 1
