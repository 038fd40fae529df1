"""The LoRA layers' wrapper on CPUs: which logits it touches, and where it takes vLLM's place."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from strict_skips import NO_CPU_VLLM, WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.platforms import current_platform

from icarus.errors import InputError
from icarus.vllm.cpu import lora, lora_rows

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason=NO_CPU_VLLM)

ROWS, INPUTS, OUTPUTS, RANK = 2, 6, 3, 4


class Head:
    """An ``lm_head`` with one adapter, which both rows of a step have."""

    def __init__(self) -> None:
        self.wrapper = lora.RowsWrapper(ROWS, 1, torch.device("cpu"))
        self.a, self.b = torch.ones(1, 1, RANK, INPUTS), torch.ones(1, 1, OUTPUTS, RANK)
        torch.ops.icarus.set_weights([self.a], [self.b], self.wrapper._sampled, 0)
        lora_rows.find_runs([0] * ROWS, self.wrapper._sampled)

    def logits(self) -> Tensor:
        y = torch.zeros(ROWS, OUTPUTS)
        self.wrapper.add_lora_logits(y, torch.ones(ROWS, INPUTS), self.a)
        return y


@pytest.fixture(autouse=True)
def operator() -> None:
    if not lora_rows.available():
        pytest.skip("no C++ compiler")


@pytest.fixture
def head() -> Iterator[Head]:
    head = Head()
    yield head
    torch.ops.icarus.forget(head.a)


def test_logits_of_a_prompt_are_left_alone_and_those_of_sampled_rows_are_not(head: Head) -> None:
    score = lora.wrap_get_prompt_logprobs_dict(lambda runner: head.logits())
    assert head.logits().all()
    assert not score(SimpleNamespace()).any()
    assert head.logits().all()


def test_an_error_while_a_prompt_is_scored_ends_it(head: Head) -> None:
    def fails(runner: Any) -> None:
        assert not head.logits().any()
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        lora.wrap_get_prompt_logprobs_dict(fails)(SimpleNamespace())
    assert head.logits().all()


@pytest.mark.parametrize(("switch", "sharded", "ours"), [("1", False, True), ("0", False, False), ("1", True, False)])
def test_it_takes_vllms_place_where_it_can(
    monkeypatch: pytest.MonkeyPatch, switch: str, sharded: bool, ours: bool
) -> None:
    monkeypatch.setenv(lora_rows.SWITCH_VARIABLE, switch)
    choose = lora.wrap_get_punica_wrapper(lambda *args, **kwargs: "vLLM's")
    config = SimpleNamespace(fully_sharded_loras=sharded)
    chosen = choose(ROWS, 1, torch.device("cpu"), lora_config=config)
    assert isinstance(chosen, lora.RowsWrapper) is ours


@pytest.mark.parametrize("eager", [False, True])
def test_a_worker_that_decides_otherwise_than_the_front_end_stops(monkeypatch: pytest.MonkeyPatch, eager: bool) -> None:
    """A compiled graph would keep the rows of the step in which vLLM's own operators were traced."""
    from vllm.config import LoRAConfig

    config = LoRAConfig()
    model = SimpleNamespace(is_moe=False, enforce_eager=eager)
    seen = SimpleNamespace(lora_config=config, model_config=model)
    lora.wrap_check_and_update_config(lambda configuration: None)(seen)
    choose = lora.wrap_get_punica_wrapper(lambda *args, **kwargs: "vLLM's")
    sent = pickle.loads(pickle.dumps(config))
    assert isinstance(choose(ROWS, 1, torch.device("cpu"), lora_config=sent), lora.RowsWrapper)
    monkeypatch.setenv(lora_rows.SWITCH_VARIABLE, "0")
    if eager:
        assert choose(ROWS, 1, torch.device("cpu"), lora_config=sent) == "vLLM's"
        return
    with pytest.raises(InputError, match="alike on all nodes"):
        choose(ROWS, 1, torch.device("cpu"), lora_config=sent)
