"""What workers say of themselves, with plain objects for workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from icarus.vllm.cpu.lora import RowsWrapper
from icarus.vllm.patching import MARK
from icarus.vllm.worker import identity
from icarus.vllm.worker.identity import ATTRIBUTE, answer, mark


def patched() -> Any:
    def execute_model(self: Any) -> str:
        return "with decoder rows"

    setattr(execute_model, MARK, "the record")
    return execute_model


class Runner:
    """The runner that the plugin has changed."""

    execute_model = patched()

    def __init__(self, device: str = "cuda", wrapper: object = None, **additional: object) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional)
        self.device = torch.device(device)
        manager = SimpleNamespace(punica_wrapper_mapping={"language_model": wrapper})
        self.lora_manager = SimpleNamespace(_adapter_manager=manager)


class Other:
    """Another one, with the same LoRA manager."""


class Child(Runner):
    """One of a platform, which leaves alone what the plugin has changed."""


class Stubborn(Runner):
    def execute_model(self) -> str:
        return "its own"


class Worker:
    def __init__(self, runner: object) -> None:
        self.model_runner = runner


mark(Runner)
setattr(Worker, ATTRIBUTE, property(answer))


def unfit(runner: object) -> str:
    plugin, reason = getattr(Worker(runner), ATTRIBUTE, None)  # as the engine core asks
    assert plugin == identity.identity()
    return str(reason)


def test_a_changed_runner_and_what_inherits_from_it_are_fit() -> None:
    assert unfit(Runner()) == unfit(Child()) == ""


@pytest.mark.parametrize(("runner", "said"), [(Other(), "Other"), (Stubborn(), "whose own execute_model")])
def test_other_runners_are_not(runner: object, said: str) -> None:
    assert said in unfit(runner)


def test_a_runner_that_another_version_has_changed_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_icarus_changed_by", "icarus-llm 0.0.1 on vLLM 0.1.0")
    assert "which has no decoder rows" in unfit(Runner())


class Inputs:
    """A model state whose two functions the plugin has changed."""

    prepare_inputs = prepare_inputs_embeds = patched()


class OwnInputs(Inputs):
    def prepare_inputs(self) -> str:
        return "its own"


def test_a_model_that_prepares_its_inputs_itself_is_not() -> None:
    runner: Any = Runner()
    runner.model_state = Inputs()
    assert unfit(runner) == ""
    runner.model_state = OwnInputs()
    assert "OwnInputs, whose own prepare_inputs knows no decoder rows" in unfit(runner)


def test_on_cpus_the_operator_must_be_ours() -> None:
    assert unfit(Runner("cpu", RowsWrapper.__new__(RowsWrapper))) == ""
    assert "ICARUS_CPU_LORA" in unfit(Runner("cpu", object()))
    assert unfit(Runner("cuda", object())) == ""


def test_one_that_cannot_read_once_although_it_was_told_to_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from icarus.vllm.gpu import attention

    monkeypatch.setattr(attention, "refusal", lambda runner: "cannot read K/V once")
    assert unfit(Runner(icarus_read_kv_once=True)) == "cannot read K/V once"
    assert unfit(Runner(icarus_read_kv_once=False)) == unfit(Runner()) == ""


def test_the_identity_has_both_versions_and_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    before = identity.identity()
    assert vllm.__version__ in before
    monkeypatch.setattr(identity, "LEDGER", identity.LEDGER[1:])
    assert identity.identity.__wrapped__() != before


@pytest.mark.parametrize(
    ("installed", "said"),
    [("0.2.0", "tested"), ("0.3.0+cu130", "checked by source"), ("0.4.0", "untested"), ("0.2.0+cpu", "tested")],
)
def test_what_is_known_of_a_version(installed: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", installed)
    monkeypatch.setattr(identity, "TESTED", ("0.2.0",))
    monkeypatch.setattr(identity, "CHECKED", ("0.3.0",))
    assert identity.standing().startswith(said)


@pytest.mark.parametrize("v2", [False, True])
def test_a_worker_marks_the_runner_that_it_makes(v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    from icarus.vllm.plugin import register
    from icarus.vllm.worker import choice, runner_v2

    register()
    applied: list[int] = []
    monkeypatch.setattr(choice, "apply", lambda changes, *args: applied.append(len(changes)))
    changed = runner_v2._extended_class(CPUModelRunner) if v2 else CPUModelRunner
    worker = WorkerBase.__new__(WorkerBase)
    worker.model_runner = changed.__new__(changed)
    worker.model_runner.device = torch.device("cuda")
    config = SimpleNamespace(use_v2_model_runner=v2, additional_config={})
    worker.model_runner.vllm_config = config
    make = choice.wrap_init(lambda self, config: None)
    for kind in changed.__mro__:
        if "_icarus_changed_by" in vars(kind):
            monkeypatch.delattr(kind, "_icarus_changed_by")
    assert "which has no decoder rows" in getattr(worker, ATTRIBUTE)[1]
    make(worker, config)
    assert getattr(worker, ATTRIBUTE) == (identity.identity(), "")
    assert len(applied) == 1
    make(worker, SimpleNamespace(use_v2_model_runner=v2, additional_config={"icarus_read_kv_once": True}))
    assert applied[1:] == [applied[0], 4], "attention of GPUs only where it is asked for"
