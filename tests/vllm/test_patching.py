"""Records are applied all or none, once, and only to what they were written against."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from icarus.vllm.patching import Attributes, Hook, Patch, PatchError, apply, known_attributes

TESTED = ("0.1.0", "0.2.0")
VERSION = TESTED[-1]


def louder(original: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: original(*args) + "!"


@pytest.fixture
def engine() -> Iterator[Any]:
    module = ModuleType("an_engine")
    source = (
        "class Runner:\n    def run(self, step):\n        self.last = step\n        return step\n"
        "def key(request):\n    return request\n"
    )
    exec(source, vars(module))
    sys.modules["an_engine"] = module
    sys.modules["our_side"] = ours = ModuleType("our_side")
    ours.louder = louder  # type: ignore[attr-defined]
    yield module
    del sys.modules["an_engine"], sys.modules["our_side"]


def record(target: str, parameters: str) -> Patch:
    return Patch(Hook("never", "why"), target, parameters, "our_side:louder", "what", "why", "file:1")


METHOD, FUNCTION = record("an_engine:Runner.run", "self step"), record("an_engine:key", "request")


def test_methods_and_functions_are_wrapped_once(engine: Any) -> None:
    assert apply([METHOD, FUNCTION], VERSION, TESTED) == 2
    assert apply([METHOD, FUNCTION], VERSION + "+cpu", TESTED) == 0
    assert (engine.Runner().run("a"), engine.key("b")) == ("a!", "b!")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (replace(FUNCTION, parameters="request salt"), "takes"),
        (replace(FUNCTION, target="an_engine:hash"), "has no"),
        (replace(FUNCTION, target="no_engine:key"), "has no"),
        (replace(METHOD, target="an_engine:Walker.run"), "has no"),
    ],
)
def test_a_mismatch_changes_nothing_and_says_what_to_do(engine: Any, bad: Patch, said: str) -> None:
    with pytest.raises(PatchError, match=said) as caught:
        apply([METHOD, bad], VERSION, TESTED)
    assert "VLLM_PLUGINS" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.Runner().run("a") == "a"


@pytest.mark.parametrize("version", ["0.3.0", "0.1.2+cpu", "dev"])
def test_an_untested_version_is_refused(engine: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICARUS_UNTESTED_VLLM", raising=False)
    with pytest.raises(PatchError, match="VLLM_PLUGINS"):
        apply([METHOD], version, TESTED)
    assert engine.Runner().run("a") == "a"
    monkeypatch.setenv("ICARUS_UNTESTED_VLLM", "1")
    assert apply([METHOD], version, TESTED) == 1


def test_a_version_that_was_checked_is_served(engine: Any) -> None:
    assert apply([METHOD], "0.3.0+cu130", TESTED, ("0.3.0",)) == 1


def test_parameters_of_older_versions_pass(engine: Any) -> None:
    assert apply([replace(METHOD, parameters="self step more", before=("self", "self step"))], VERSION, TESTED) == 1


class Base:
    annotated: int
    defined = 1

    def __init__(self, other: Any) -> None:
        self.assigned, other.elsewhere = 1, 2
        self.inner = lambda: self.read

    @property
    def computed(self) -> int:
        self.cached = 2
        return self.cached


class Derived(Base):
    def __init__(self) -> None:
        self.own: int = 1


@pytest.mark.parametrize("name", ["annotated", "defined", "assigned", "inner", "computed", "cached", "own", "__init__"])
def test_an_attribute_is_known_if_a_class_defines_annotates_or_assigns_it(name: str) -> None:
    assert known_attributes(Derived, ["nothing", name, "read"]) == {name}


def test_an_attribute_that_is_gone_changes_nothing_and_says_what_to_do(engine: Any) -> None:
    held, gone = Attributes("an_engine:Runner", "run last"), Attributes("an_engine:Runner", "run buffer")
    with pytest.raises(PatchError, match=r"an_engine:Runner of vLLM 0\.2\.0 has no attribute 'buffer'") as caught:
        apply([METHOD], VERSION, TESTED, attributes=[held, gone])
    assert "VLLM_PLUGINS" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.Runner().run("a") == "a"
    with pytest.raises(PatchError, match="has no an_engine:Walker"):
        apply([METHOD], VERSION, TESTED, attributes=[Attributes("an_engine:Walker", "run")])
    assert apply([METHOD], VERSION, TESTED, attributes=[held]) == 1
    assert apply([METHOD], VERSION, TESTED, attributes=[gone]) == 0, "it was checked when the record was applied"
