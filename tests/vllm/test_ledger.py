"""The ledger's records: complete, named after what they wrap, true of the installed vLLM, and in the documentation."""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib import import_module
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from icarus.vllm import patching
from icarus.vllm.ledger import CHECKED, LEDGER, TESTED, changes
from icarus.vllm.patching import READ_ONCE, Override, Patch
from strict_skips import needs_vllm
from tools import ledger_page


def original_name(patch: Patch) -> str:
    return patch.target.replace(".", ":").split(":")[-1]


def installed(patch: Patch) -> Any:
    """What vLLM calls by this name, changed or not."""
    module, _, path = patch.target.partition(":")
    return attrgetter(path)(import_module(module))


def before(patch: Patch) -> Any:
    """What vLLM has there, also where a class of ours stands in front of vLLM's."""
    if isinstance(patch, Override):
        owner = installed(replace(patch, target=patch.target.rpartition(".")[0]))
        theirs = [vars(kind) for kind in owner.__mro__ if not kind.__module__.startswith("icarus")]
        return next(names[original_name(patch)] for names in theirs if original_name(patch) in names)
    found = installed(patch)
    return found.__mro__[2] if isinstance(found, type) and hasattr(found, patching.MARK) else found


def test_every_record_is_complete_and_its_target_is_wrapped_once() -> None:
    assert len({patch.target for patch in LEDGER}) == len(LEDGER)
    for patch in LEDGER:
        assert all(value for name, value in vars(patch).items() if name not in ("before", "runner"))
        assert patch.upstream.partition(":")[2].isdigit()
        assert patch.runner in ("", "V1", "V2", READ_ONCE)
    hooks = [patch.hook for patch in LEDGER]
    assert len(set(hooks)) == len(list(groupby(hooks))), "the changes of a hook stand together"


def test_a_worker_with_one_runner_has_no_change_of_the_other() -> None:
    assert {*changes(), *changes("V1"), *changes("V2"), *changes(READ_ONCE)} == set(LEDGER)
    assert not {*changes("V1")} & {*changes("V2")}
    replaced = [patch for patch in changes("V2") if not isinstance(patch, Override)]
    assert len(replaced) < len(changes("V1")), "V2 passes one batch through a step, so fewer functions are replaced"


@needs_vllm
@pytest.mark.parametrize("patch", LEDGER, ids=original_name)
def test_every_record_says_where_its_original_stands_in_the_newest_tested_version(patch: Patch) -> None:
    import vllm

    if vllm.__version__.partition("+")[0] != TESTED[-1]:
        return  # of an older one the lines are not kept
    found = inspect.unwrap(before(patch))
    lines, first = inspect.getsourcelines(found)
    file = Path(inspect.getsourcefile(found) or "").relative_to(Path(vllm.__file__).parents[1])
    begins = f"{'class' if isinstance(found, type) else 'def'} {found.__name__}("
    line = first + next(number for number, text in enumerate(lines) if begins in text)
    assert patch.upstream == f"{file}:{line}"


@pytest.mark.parametrize("patch", LEDGER, ids=original_name)
def test_a_wrapper_is_named_after_what_it_wraps(patch: Patch) -> None:
    module, _, function = patch.by.partition(":")
    assert module.startswith("icarus.vllm.")
    if isinstance(patch, Override):
        assert function.partition(".")[2] == original_name(patch)
    else:
        assert function.replace("_", "") == f"wrap{original_name(patch).lower().replace('_', '')}"


@needs_vllm
def test_with_vllm_the_whole_ledger_applies_and_keeps_signatures_callable() -> None:
    import vllm

    from icarus.vllm.plugin import register

    register()
    register()
    assert patching.apply(changes(), vllm.__version__, TESTED, CHECKED) == 0
    for runner in ("V1", "V2", READ_ONCE):
        patching.apply(changes(runner), vllm.__version__, TESTED, CHECKED)
        assert patching.apply(changes(runner), vllm.__version__, TESTED, CHECKED) == 0
    for patch in LEDGER:
        if not isinstance(patch, Override):
            assert patch.fits(list(inspect.signature(installed(patch)).parameters)), (
                "functools.wraps shows the original's"
            )


def test_the_documentation_lists_the_ledger() -> None:
    page = ledger_page.PAGE.read_text(encoding="utf-8")
    assert f"{ledger_page.BEGIN}{ledger_page.section()}\n\n{ledger_page.END}" in page, "python -m tools.ledger_page"
