"""What the plugin attaches to objects of vLLM."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import pytest

import icarus
from icarus.vllm.state import Attached

COUNT, NAMES = Attached[int]("count"), Attached[list[str]]("names")


@dataclass
class Owner:
    """Not hashable, as vLLM's attention metadata is not."""

    size: int = 1


def test_each_owner_has_its_own_value() -> None:
    first, second = Owner(), Owner()
    COUNT.set(first, 3)
    NAMES.set(first, ["a"])
    assert (COUNT.get(first), NAMES.get(first), COUNT.get(second)) == (3, ["a"], None)
    COUNT.set(first, None)
    assert COUNT.get(first) is None
    assert first == second, "to vLLM they are what they were"


@pytest.mark.parametrize("value", [0, None])
def test_a_value_is_made_once_even_if_it_is_false(value: int | None) -> None:
    owner, kind = Owner(), Attached[int | None]("once")
    assert kind.get_or_make(owner, lambda: value) is value
    assert kind.get_or_make(owner, lambda: pytest.fail("it is there")) is value


def test_threads_get_the_same_value() -> None:
    owner, together = Owner(), Barrier(8)

    def ask(number: int) -> list[str]:
        together.wait()
        return NAMES.get_or_make(owner, lambda: [str(number)])

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(ask, range(8)))
    assert all(value is values[0] for value in values)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
def test_copies_and_pickles_carry_it_and_go_their_own_way(copied: Callable[[Owner], Owner]) -> None:
    owner = Owner()
    COUNT.set(owner, 3)
    other = copied(owner)
    assert COUNT.get(other) == 3
    COUNT.set(other, 4)
    assert COUNT.get(owner) == 3


def test_nothing_else_in_the_plugin_sets_attributes_of_its_own() -> None:
    for path in (Path(icarus.__file__).parent / "vllm").rglob("*.py"):
        if path.name != "state.py":
            assert not re.search(r"(?<!_)_icarus_", path.read_text(encoding="utf-8")), path
