"""The ledger's records: complete, named after what they wrap, true of the installed vLLM, and in the documentation."""

from __future__ import annotations

import sys
from inspect import signature
from pathlib import Path

import pytest

from icarus.vllm import patching
from icarus.vllm.ledger import LEDGER, TESTED
from icarus.vllm.patching import Patch
from strict_skips import needs_vllm


def original_name(patch: Patch) -> str:
    return patch.target.replace(".", ":").split(":")[-1]


def test_every_record_is_complete_and_its_target_is_wrapped_once() -> None:
    assert len({patch.target for patch in LEDGER}) == len(LEDGER)
    for patch in LEDGER:
        assert all(value for name, value in vars(patch).items() if name != "before")
        assert patch.upstream.partition(":")[2].isdigit()


@needs_vllm
def test_every_record_says_where_its_original_stands_in_the_newest_tested_version() -> None:
    import vllm

    if vllm.__version__.partition("+")[0] != TESTED[-1]:
        return  # of an older one the lines are not kept
    packages = Path(vllm.__file__).parents[1]
    for patch in LEDGER:
        file, _, line = patch.upstream.partition(":")
        assert (
            f"def {original_name(patch)}(" in (packages / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        )


@pytest.mark.parametrize("patch", LEDGER, ids=original_name)
def test_a_wrapper_is_named_after_what_it_wraps(patch: Patch) -> None:
    module, _, function = patch.by.partition(":")
    assert module.startswith("icarus.vllm.")
    assert function == f"wrap_{original_name(patch).strip('_')}"


@needs_vllm
def test_with_vllm_the_whole_ledger_applies_and_keeps_signatures_callable() -> None:
    import vllm

    from icarus.vllm.plugin import register

    register()
    register()
    assert patching.apply(LEDGER, vllm.__version__, TESTED) == 0
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
