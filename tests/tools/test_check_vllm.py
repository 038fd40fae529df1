"""Two versions of an engine are compared by their sources."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icarus.vllm.patching import Attributes, Hook, Patch
from tools import check_vllm
from tools.check_vllm import Tree

OLD = {
    "vllm/__init__.py": "from .keys import *\n",
    "vllm/keys.py": 'def key(request, *more, salt=""):\n    """One."""\n    return request  # as it is\n',
    "vllm/worker/__init__.py": "",
    "vllm/worker/mixin.py": "class Mixin:\n    def load(self, name):\n        self.names = [name]\n",
    "vllm/worker/runner.py": (
        "from vllm.worker.mixin import Mixin\nfrom ..keys import key as hash_key\n"
        "class Runner(Mixin):\n    size: int = 0\n    def __init__(self):\n        self.rows: int = 1\n"
        "    def run(self, step):\n        return step\n"
        "    @classmethod\n    def check(cls, config):\n        return config\n"
    ),
}
CHECK = "vllm.worker.runner:Runner.check"
LOAD = "vllm.worker.runner:Runner.load"
RUN = "vllm.worker.runner:Runner.run"
KEY = "vllm:key"


def record(target: str, parameters: str, before: tuple[str, ...] = ()) -> Patch:
    return Patch(Hook("never", "why"), target, parameters, "ours:wrap", "what", "why", "file:1", before)


LEDGER = [
    record(RUN, "self step"),
    record(LOAD, "self name"),
    record(CHECK, "config"),
    record(KEY, "request more salt"),
    record("vllm.worker.runner:Runner", ""),
]
ATTRIBUTES = [Attributes("vllm.worker.runner:Runner", "size rows names run load")]


def tree(folder: Path, **changes: tuple[str, str]) -> Tree:
    """``OLD``, and in a file, named without its folder, one text for another."""
    for name, text in OLD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        old, new = changes.get(Path(name).stem, ("", ""))
        assert old in text
        (folder / name).write_text(text.replace(old, new) if old else text)
    return Tree(folder)


def said(tmp_path: Path, **changes: tuple[str, str]) -> dict[str, tuple[str, bool]]:
    old, new = tree(tmp_path / "old"), tree(tmp_path / "new", **changes)
    found = [*check_vllm.functions(old, new, LEDGER), *check_vllm.attributes(new, ATTRIBUTES)]
    return {change.target: (change.what, change.stops) for change in found}


def test_what_reads_the_same_is_not_mentioned(tmp_path: Path) -> None:
    assert said(tmp_path, keys=('"""One."""\n    return request  # as it is', "return ( request )")) == {}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"runner": ("return step", "return step + 1")}, {RUN: ("has another body", False)}),
        ({"mixin": ("[name]", "[]")}, {LOAD: ("has another body", False)}),
        ({"runner": ("def check", "def verify")}, {CHECK: ("is missing", True)}),
        ({"keys": ("salt", "seed")}, {KEY: ("takes request more seed", True)}),
        ({"runner": ("size: int", "width: int")}, {ATTRIBUTES[0].of: ("has no attribute size", True)}),
        ({"mixin": ("self.names", "self.all")}, {ATTRIBUTES[0].of: ("has no attribute names", True)}),
    ],
)
def test_what_has_changed(changes: Any, wanted: dict[str, tuple[str, bool]], tmp_path: Path) -> None:
    assert said(tmp_path, **changes).items() >= wanted.items()


def test_a_named_tuple_has_what_python_gives_it(tmp_path: Path) -> None:
    state = "from typing import NamedTuple\nclass State(NamedTuple):\n    rows: int\nclass Runner"
    new = tree(tmp_path, runner=("class Runner", state))
    held, gone = (Attributes("vllm.worker.runner:State", names) for names in ("_replace rows", "_change"))
    [change] = check_vllm.attributes(new, [held, gone])
    assert change.what == "has no attribute _change"


def test_parameters_of_older_versions_pass(tmp_path: Path) -> None:
    new = tree(tmp_path)
    [] = check_vllm.functions(new, new, [record(RUN, "self step more", before=("self", "self step"))])


def test_a_function_that_moved(tmp_path: Path) -> None:
    old, new = tree(tmp_path / "old"), tree(tmp_path / "new", runner=("from vllm.worker.mixin", "from vllm.mixins"))
    (tmp_path / "new" / "vllm" / "mixins.py").write_text(OLD["vllm/worker/mixin.py"])
    [change] = check_vllm.functions(old, new, LEDGER)
    assert change.what == "moved from vllm/worker/mixin.py to vllm/mixins.py"


def test_changed_bodies_are_shown(tmp_path: Path) -> None:
    [change] = check_vllm.functions(tree(tmp_path / "a"), tree(tmp_path / "b", runner=("return step", "pass")), LEDGER)
    assert "-    return step\n+    pass" in change.diff


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("from vllm.worker.runner import Runner", []),
        ("from vllm import keys", []),
        ("from vllm.worker.runner import hash_key", [("vllm.worker.runner:hash_key", False)]),
        ("from vllm.worker.runner import Walker", [("vllm.worker.runner:Walker", True)]),
        ("try:\n    from vllm.worker.runner import Walker\nexcept ImportError:\n    pass", []),
        (
            "try:\n    from vllm.worker.runner import Walker\nexcept ImportError:\n    from vllm.walk import Walker",
            [("vllm.walk:Walker", True)],
        ),
        (
            "try:\n    from vllm.worker.runner import Runner\nexcept ImportError:\n    from vllm.walk import Runner",
            [],
        ),
        ("def f():\n    from vllm import key", [("vllm:key", False)]),
        ("from elsewhere import anything", []),
    ],
)
def test_imports_that_would_fail_or_take_something_else(
    line: str, wanted: list[tuple[str, bool]], tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "file.py").write_text(line)
    old, new = tree(tmp_path / "old"), tree(tmp_path / "new", keys=("salt", "seed"))
    assert [(change.target, change.stops) for change in check_vllm.imports(old, new, ours)] == wanted


def test_of_a_wheel_the_python_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def download(command: list[str], **options: Any) -> Any:
        with zipfile.ZipFile(Path(command[-1]) / "vllm-9.9.9-py3-none-any.whl", "w") as wheel:
            for name in ("vllm/a.py", "vllm/_C.so", "vllm/worker/b.py"):
                wheel.writestr(name, "")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(check_vllm.subprocess, "run", download)
    folder = check_vllm.sources("9.9.9")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {"vllm/a.py", "vllm/worker/b.py"}
    monkeypatch.setattr(check_vllm.subprocess, "run", lambda *args, **options: pytest.fail("it is there"))
    assert check_vllm.sources("9.9.9") == folder
    assert check_vllm.sources(str(folder)) == folder


def test_a_version_that_pip_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_vllm.subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="give a folder with its sources"):
        check_vllm.sources("9.9.9")


@pytest.mark.parametrize(("change", "status"), [(("return step", "pass"), 0), (("def run", "def walk"), 1)])
def test_the_command(
    change: tuple[str, str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree(tmp_path / "old"), tree(tmp_path / "new", runner=change)
    monkeypatch.setattr(check_vllm, "LEDGER", LEDGER)
    monkeypatch.setattr(check_vllm, "ATTRIBUTES", [])
    monkeypatch.setattr(check_vllm, "PLUGIN", tmp_path / "nothing of ours")
    assert check_vllm.main([str(tmp_path / "new"), "--against", str(tmp_path / "old"), "--diff"]) == status
    assert ("would refuse" in capsys.readouterr().out) is bool(status)
