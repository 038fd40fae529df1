"""What can be told of an adapter directory without judging it, and the package's door."""

from pathlib import Path

import pytest

from icarus import adapter
from specimens import edit, llama, specialist


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return adapter.save(specialist(llama()), tmp_path / "adapter")


def test_the_marker_tells_icarus_adapters(directory: Path, tmp_path: Path) -> None:
    assert adapter.is_icarus(directory)
    assert not adapter.is_icarus(tmp_path)
    edit(lambda config: config.pop("icarus"))(directory)
    assert not adapter.is_icarus(directory)
    (directory / adapter.CONFIG_NAME).write_text("[")
    assert not adapter.is_icarus(directory)


def test_the_door_has_the_names_it_says() -> None:
    assert sorted(adapter.__all__) == sorted(adapter._HOMES)
    assert all(hasattr(adapter, name) for name in adapter.__all__)
    with pytest.raises(AttributeError, match=r"'icarus\.adapter' has no attribute 'nothing'"):
        _ = adapter.nothing
