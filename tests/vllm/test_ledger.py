"""The ledger: applied whole or not at all, once, and only to what it was written against."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from icarus.vllm import ledger
from icarus.vllm.ledger import LEDGER, Patch, PatchError
from strict_skips import needs_vllm

VERSION = ledger.TESTED[-1]


def louder(stock: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: stock(*args) + "!"


@pytest.fixture
def engine() -> Iterator[Any]:
    module = ModuleType("an_engine")
    source = "class Runner:\n    def run(self, step):\n        return step\n\ndef key(request):\n    return request\n"
    exec(source, vars(module))
    sys.modules["an_engine"] = module
    sys.modules["our_side"] = ours = ModuleType("our_side")
    ours.louder = louder  # type: ignore[attr-defined]
    yield module
    del sys.modules["an_engine"], sys.modules["our_side"]


def record(target: str, parameters: str) -> Patch:
    return Patch(target, parameters, "our_side:louder", "what", "why", "file:1", "never")


METHOD, FUNCTION = record("an_engine:Runner.run", "self step"), record("an_engine:key", "request")


def test_methods_and_functions_are_wrapped_once(engine: Any) -> None:
    assert ledger.apply([METHOD, FUNCTION], VERSION) == 2
    assert ledger.apply([METHOD, FUNCTION], VERSION + "+cpu") == 0
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
        ledger.apply([METHOD, bad], VERSION)
    assert "VLLM_PLUGINS" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.Runner().run("a") == "a"


@pytest.mark.parametrize("version", ["0.33.0", "0.31.2+cpu", "dev"])
def test_an_untested_version_is_refused(engine: Any, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICARUS_UNTESTED_VLLM", raising=False)
    with pytest.raises(PatchError, match="VLLM_PLUGINS"):
        ledger.apply([METHOD], version)
    assert engine.Runner().run("a") == "a"
    monkeypatch.setenv("ICARUS_UNTESTED_VLLM", "1")
    assert ledger.apply([METHOD], version) == 1


def test_parameters_of_an_older_version_pass(engine: Any) -> None:
    assert ledger.apply([replace(METHOD, parameters="self step more", before="self step")], VERSION) == 1


def test_every_record_is_complete_and_its_target_is_wrapped_once() -> None:
    assert len({patch.target for patch in LEDGER}) == len(LEDGER)
    for patch in LEDGER:
        assert all(value for name, value in vars(patch).items() if name != "before")
        assert patch.upstream.partition(":")[2].isdigit()
        assert patch.by.startswith("icarus.vllm.")


@needs_vllm
def test_with_vllm_the_whole_ledger_applies_and_keeps_signatures_callable() -> None:
    import vllm

    from icarus.vllm.plugin import register

    register()
    register()
    assert ledger.apply(LEDGER, vllm.__version__) == 0
    for patch in LEDGER:
        owner = sys.modules[patch.target.partition(":")[0]]
        for part in patch.target.partition(":")[2].split("."):
            owner = getattr(owner, part)
        shown = list(signature(owner).parameters)
        assert shown in (patch.parameters.split(), patch.before.split()), "functools.wraps shows the original's"


def test_the_documentation_lists_the_ledger() -> None:
    page = (Path(__file__).parents[2] / "docs" / "inside-vllm.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{patch.target.partition(':')[2]}` | {patch.what} | {patch.until} |" for patch in LEDGER]
