"""The Python files of one vLLM over the compiled ones of another: ``make test-sources VERSION=0.33.0``.

New versions come without a build for CPUs for some weeks, and the suite runs on CPUs. Compiled functions change less
often than what calls them, so it says of a new version's Python what can be known before there is a build.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tools.check_vllm import SOURCES, sources

METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
"""By ``cpu`` in the name of the build vLLM knows its platform."""


def mixed(version: str, built: Path) -> Path:
    """A folder to put in front of ``PYTHONPATH``, made anew.

    Args:
        version: whose Python files; as ``check_vllm`` takes it.
        built: the folder that has an installed ``vllm/`` with compiled files.
    """
    python = sources(version)
    name = python.name.removeprefix("vllm-")
    folder = (SOURCES / f"vllm-{name}-mixed").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(python / "vllm", folder / "vllm", ignore=shutil.ignore_patterns("*.so"))
    for library in (built / "vllm").glob("*.so"):
        (folder / "vllm" / library.name).symlink_to(library.resolve())
    distribution = folder / f"vllm-{name}+cpu.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(METADATA.format(version=name), encoding="utf-8")
    return folder


def main() -> None:
    """Print the folder for the installed vLLM's compiled files."""
    import vllm

    print(mixed(sys.argv[1], Path(vllm.__file__).parents[1]))


if __name__ == "__main__":
    main()
