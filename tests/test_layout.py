"""The direction of imports (docs/architecture.md): a module imports from below, never from above or from a sibling.

And the map there has a line for every file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import icarus

ROOT = Path(icarus.__file__).parent
# Each line may import the lines above it; a line's members import one another only within a package. ``icarus`` itself
# is the package's front door, whose names are lazy, and stands on top of all.
LEVELS = [
    {"errors"},
    {"atomic", "hub", "vllm_environment", "processor", "memory"},
    {"arguments"},
    {"chat_template", "shipped_specialists", "model_folder"},
    {"adapter"},
    {"packaged_model"},
    {"base_model"},
    {"lora", "attention", "model_length"},
    {"streams"},
    {"context"},
    {"team"},
    {"train", "vllm", "bench"},
    {"evaluate"},
    {"demo", "turns", "chat", "verify"},
    {"cli"},
    {""},
]
# Within the plugin: by the process in which code runs, the front end on top; ledger, marks, counters and the layout of
# a step are what all share. ``plugin`` is called by vLLM and stands above all.
PLUGIN = ["cpu", "gpu", "worker", "engine", "server", "plugin"]
HEIGHT = {part: level for level, parts in enumerate(LEVELS) for part in parts}
ONLY_IN = {"peft": {"adapter"}, "trl": {"train"}, "datasets": {"train"}, "vllm": {"vllm"}, "lm_eval": {"evaluate"}}
DOORS = {"adapter"}  # packages of which others import the names in ``__init__`` alone
VAGUE = {"utils", "common", "helpers", "misc", "base"}


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imported(path: Path, root: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever it does; ``from icarus import x`` is ``icarus.x``."""
    package = ["icarus", *path.relative_to(root).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def room(module: str) -> int:
    """The height of a module of the plugin among its packages; 0 for what they share, and outside."""
    part, _, rest = module.partition(".")
    inner = rest.split(".")[0]
    return PLUGIN.index(inner) + 1 if part == "vllm" and inner in PLUGIN else 0


def is_module(path: str) -> bool:
    """Whether a path within the package is a file of a package, and not a name in it."""
    return any((ROOT / part).with_suffix(".py").is_file() for part in (path, str(Path(path).parent)))


def violations(root: Path) -> list[str]:
    broken = []
    for path in sorted(root.rglob("*.py")):
        module = module_of(path, root)
        part = module.split(".")[0]
        if VAGUE & set(module.split(".")):
            broken.append(f"{module}: a vague name")
        if part not in HEIGHT:
            broken.append(f"{module}: in no level of this test")
            continue
        for name in imported(path, root):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top in ONLY_IN and part not in ONLY_IN[top]:
                broken.append(f"{module} imports {top}")
            if top == "icarus" and target in DOORS and target != part and is_module(rest.replace(".", "/")):
                broken.append(f"{module} imports {name}, and not its door")
            if top == "icarus" and target == "vllm" and part != "vllm":  # cli names its module and imports it late
                broken.append(f"{module} imports {name}")
            if (
                name.endswith(("huggingface_hub.snapshot_download", "huggingface_hub.hf_hub_download"))
                and part != "hub"
            ):
                broken.append(f"{module} imports {name}, and hub.py is what downloads")
            above = target != part and HEIGHT.get(target, HEIGHT[""]) >= HEIGHT[part]
            if top == "icarus" and (above or (part == "vllm" and room(rest) > room(module))):
                broken.append(f"{module} imports {name}")
    return broken


def test_imports_go_one_way() -> None:
    modules = [module_of(path, ROOT) for path in ROOT.rglob("*.py")]
    assert {"errors", "streams", "train.run", "cli", ""} <= set(modules)
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("errors.py", "from icarus import streams", "errors imports icarus.streams"),
        ("adapter/checks.py", "from icarus import lora", "adapter.checks imports icarus.lora"),
        ("streams.py", "import icarus.context", "streams imports icarus.context"),
        ("streams.py", "from .context import Context", "streams imports icarus.context.Context"),
        ("streams.py", "from icarus import Context", "streams imports icarus.Context"),
        ("streams.py", "def f():\n    import peft.tuners", "streams imports peft"),
        ("context.py", "if 1:\n    from icarus.train import run", "context imports icarus.train.run"),
        ("train/run.py", "from icarus.bench import measure", "train.run imports icarus.bench.measure"),
        ("train/run.py", "from ..bench import measure", "train.run imports icarus.bench.measure"),
        ("bench/run.py", "from vllm import LLM", "bench.run imports vllm"),
        (
            "vllm/worker/runner_v1.py",
            "from icarus.vllm.server import serve",
            "vllm.worker.runner_v1 imports icarus.vllm.server.serve",
        ),
        (
            "vllm/marks.py",
            "from icarus.vllm.engine.policy import Policy",
            "vllm.marks imports icarus.vllm.engine.policy.Policy",
        ),
        (
            "vllm/cpu/lora.py",
            "import icarus.vllm.worker.runner_v1",
            "vllm.cpu.lora imports icarus.vllm.worker.runner_v1",
        ),
        ("demo.py", "from icarus.vllm import marks", "demo imports icarus.vllm.marks"),
        (
            "base_model.py",
            "from huggingface_hub import snapshot_download",
            "base_model imports huggingface_hub.snapshot_download, and hub.py is what downloads",
        ),
        ("train/run.py", "from icarus import cli", "train.run imports icarus.cli"),
        (
            "context.py",
            "from icarus.adapter.checks import verify",
            "context imports icarus.adapter.checks.verify, and not its door",
        ),
        ("context.py", "from icarus.adapter import checks", "context imports icarus.adapter.checks, and not its door"),
        ("context.py", "import icarus.adapter.checks", "context imports icarus.adapter.checks, and not its door"),
        ("train/utils.py", "", "train.utils: a vague name"),
        ("helpers/__init__.py", "", "helpers: a vague name"),
        ("new.py", "", "new: in no level of this test"),
    ],
)
def test_a_planted_violation_is_found(file: str, line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert message in violations(tmp_path)


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "run.py").write_text(
        "import torch, trl\nfrom icarus import adapter\nfrom icarus.adapter import feeds_kv\n"
        "from icarus.train import data\nfrom . import config\n"
    )
    (tmp_path / "adapter.py").write_text("from peft import LoraConfig\nfrom icarus.errors import InputError\n")
    assert violations(tmp_path) == []


# ------------------------------------------------------------------------------------------- the map


MAP = Path(__file__).parents[1] / "docs" / "architecture.md"


def mapped(text: str) -> Iterator[str]:
    """Folders and files of the map, as it has them: a folder at the beginning of a line, its files below."""
    folder = ""
    for line in text.partition("## Every file\n")[2].partition("```\n")[2].partition("```")[0].splitlines():
        if line.startswith(" "):
            yield folder + line.split()[0]
        elif line:
            folder = line.split()[0]
            yield folder


def test_the_map_has_every_file_once() -> None:
    files = {f"src/icarus/{path.relative_to(ROOT)}" for path in ROOT.rglob("*") if path.suffix in (".py", ".cpp")}
    wanted = [file.removesuffix("__init__.py") for file in files]
    assert sorted(mapped(MAP.read_text(encoding="utf-8"))) == sorted(wanted)


def test_a_file_that_is_not_in_the_map_is_seen() -> None:
    block = "a/          one\n    x.py    two\n\na/b/        three\n    y.cpp\n"
    text = f"```\nw.py\n```\n## Every file\n\n```\n{block}```\n\n```\nz.py\n```\n"
    assert list(mapped(text)) == ["a/", "a/x.py", "a/b/", "a/b/y.cpp"]
