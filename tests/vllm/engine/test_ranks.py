"""The engine core asks its workers before it serves an adapter. Starts no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.v1.serial_utils import run_method

from icarus.vllm.engine import ranks
from icarus.vllm.engine.ranks import REFUSALS, Refusals, judge
from icarus.vllm.worker.identity import ATTRIBUTE, identity, standing

FIT = ("this plugin", "")


class Executor:
    """Has vLLM call a method of its workers."""

    def __init__(self, *workers: object) -> None:
        self.workers, self.calls = workers, 0

    def collective_rpc(self, method: Any, args: Any) -> list[Any]:
        self.calls += 1
        return [run_method(worker, method, args, {}) for worker in self.workers]


def core(*workers: object, lora: object = object()) -> Any:
    """An engine core that has just initialized its caches."""
    core = SimpleNamespace(model_executor=Executor(*workers))
    start = ranks.wrap_initialize_kv_caches(lambda self, config: "layout")
    assert start(core, SimpleNamespace(lora_config=lora)) == "layout"
    return core


def worker(*answer: str) -> Any:
    return SimpleNamespace(**{ATTRIBUTE: answer})


def test_workers_that_are_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(ranks.logger, "info", lambda text, *values: said.append(text % values))
    assert REFUSALS.get(core(worker(identity(), ""), worker(identity(), ""))) == Refusals()
    assert said == [f"{identity()} ({standing()})"]


def test_a_worker_without_the_plugin_gets_no_adapter_at_all() -> None:
    """It could not even unpickle what it is sent. Being asked, it raises nothing."""
    refusals = REFUSALS.get(core(worker(identity(), ""), SimpleNamespace(model_runner="vLLM's own")))
    assert refusals is not None
    assert "rank 1 runs vLLM without ICaRus" in refusals.adapters
    assert refusals.sharing == refusals.adapters


@pytest.mark.parametrize("other", [("another plugin", ""), ("another plugin", "runs another runner")])
def test_neither_does_one_with_another_version(other: object) -> None:
    refusals = judge([FIT, FIT, other], "this plugin")
    assert "rank 2 runs another plugin, and the engine core this plugin" in refusals.adapters
    assert refusals.sharing == refusals.adapters


@pytest.mark.parametrize("other", [None, "", (), ("this plugin",), (1, 2), ("this plugin", None), {"this plugin": ""}])
def test_neither_does_one_that_says_something_else(other: object) -> None:
    assert judge([other, FIT], "this plugin").adapters


def test_a_worker_with_another_runner_gets_conventional_adapters_alone() -> None:
    refusals = judge([FIT, ("this plugin", "runs another runner"), ("this plugin", "so does this")], "this plugin")
    assert refusals == Refusals(adapters="", sharing="rank 1 runs another runner")
    assert judge([("this plugin", "runs another runner"), None], "this plugin").adapters, "whatever the order"


def test_without_lora_nobody_is_asked() -> None:
    assert core(SimpleNamespace(), lora=None).model_executor.calls == 0
