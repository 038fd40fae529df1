"""The lock, which make installs without resolving, holds what pyproject.toml asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from icarus.vllm.ledger import CHECKED, TESTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# make does not install vLLM's build for GPUs.
ASKED = [*PROJECT["dependencies"], *(asked for extra in ("train", "cpu", "eval", "bench") for asked in EXTRAS[extra])]


def locked() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


@pytest.mark.parametrize("asked", ASKED)
def test_a_requirement_is_locked_within_its_range(asked: str) -> None:
    requirement = Requirement(asked)
    (pin,) = locked()[canonicalize_name(requirement.name)].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


@pytest.mark.parametrize(("extra", "newest"), [("cpu", TESTED[-1]), ("gpu", CHECKED[-1])])
def test_vllm_may_be_what_was_tested_and_on_gpus_what_was_checked(extra: str, newest: str) -> None:
    assert Requirement(EXTRAS[extra][0]).specifier == SpecifierSet(f">={TESTED[0]},<={newest}")
