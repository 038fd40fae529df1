"""What users may import is decided here: a name that comes, goes or moves changes this test."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest

import icarus

ADAPTER = (
    "CONFIG_NAME MARKER_VERSION WEIGHTS_NAME AdapterInfo ConventionalInfo attach attach_conventional check_attached "
    "conventional_problems decoder_targets feeds_kv fingerprint from_pretrained is_conventional is_icarus load locate "
    "merge names problems push_to_hub save save_conventional twin verify verify_conventional weights_name"
)
EXPORTED = {
    "icarus": "BASE PACKAGED PREPARED Batch Context EncoderCache Specialists Turn TwoStreams errors shipped",
    "icarus.adapter": ADAPTER,
    "icarus.errors": "AdapterError CheckFailed DataError IcarusError InputError UnsupportedModelError",
    "icarus.train": "IcarusDistillationConfig IcarusDistillationTrainer IcarusSFTTrainer",
}


def public(module: Any) -> set[str]:
    """``__all__``, or else the classes of a module that defines no more."""
    classes = (value for value in vars(module).values() if inspect.isclass(value))
    own = {value.__name__ for value in classes if value.__module__ == module.__name__}
    return set(getattr(module, "__all__", own))


@pytest.mark.parametrize("module", EXPORTED)
def test_exported_names_are_these_and_can_be_imported(module: str) -> None:
    imported = import_module(module)
    assert public(imported) == set(EXPORTED[module].split())
    assert all(getattr(imported, name) is not None for name in public(imported))


@pytest.mark.parametrize("package", ["icarus", "icarus.adapter", "icarus.train"])
def test_a_checker_sees_the_names_that_are_imported_late(package: str) -> None:
    """Those under TYPE_CHECKING, ``__all__`` and the table of homes are one list."""
    module = import_module(package)
    source = inspect.getsource(module).partition("if TYPE_CHECKING:")[2].partition("\n\n")[0]
    homes = {}
    for line in source.strip().splitlines():
        home, _, names = line.strip().removeprefix(f"from {package}.").partition(" import ")
        homes |= dict.fromkeys(names.split(", "), home)
    assert homes == module._HOMES
    assert set(module.__all__) - homes.keys() <= {"errors"}


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        icarus.nothing  # noqa: B018
