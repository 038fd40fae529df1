"""Attributes of vLLM's objects: each that our code names is listed, and is looked for when a process starts."""

from __future__ import annotations

import ast
import hashlib
import os
from argparse import ArgumentParser
from asyncio import Task
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from contextvars import ContextVar
from importlib import import_module
from inspect import Signature
from io import BytesIO
from logging import Logger
from pathlib import Path
from subprocess import CompletedProcess
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch

import icarus
from icarus.vllm.attributes import ATTRIBUTES
from icarus.vllm.ledger import CHECKED, LEDGER, TESTED
from icarus.vllm.patching import Attributes, PatchError, apply, known_attributes
from strict_skips import needs_vllm

SOURCE = Path(icarus.__file__).parent
PLUGIN = SOURCE / "vllm"
STARTERS = {"server/serve.py", "server/plan.py", "patching.py"}  # have parsers and classes in their hands, no engine
LISTED = {name for record in ATTRIBUTES for name in record.names.split()}
WRAPPED = {patch.target.replace(":", ".").split(".")[-1] for patch in LEDGER}
UNLISTED = {
    "call_utility_all_async",  # 0.31 has none, and server/cores.py asks first
    "api_key",  # of vLLM's arguments
    "openai_serving_models",  # of Starlette's ``app.state``, which is a dictionary
    "state",
    "__mro__",
    "__wrapped__",
}


def accessed(tree: ast.AST) -> Iterator[str]:
    """Attributes that are read or written, but not those of modules."""
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root: ast.AST = node.value
            while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
                root = root.func if isinstance(root, ast.Call) else root.value
            if not (isinstance(root, ast.Name) and root.id in imported):
                yield node.attr


def own() -> Iterator[str]:
    """Names that our classes define or assign."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py"))
    for kind in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(kind):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.id if isinstance(node, ast.Name) else node.attr


def of_libraries() -> set[str]:
    kinds: tuple[Any, ...] = (
        str, list, dict, set, tuple, OSError, BytesIO, Path, Counter, ContextVar, ExitStack, Task, Logger,
        ArgumentParser, hashlib.sha256(), os.stat_result, Signature, FunctionType, np.ndarray, torch.Tensor,
        torch.Event,
    )  # fmt: skip
    names = set().union(*map(dir, kinds), vars(CompletedProcess([], 0)))
    return names | {"add_metric", "register"}  # of prometheus_client


KNOWN = LISTED | WRAPPED | UNLISTED | set(own()) | of_libraries()


def unlisted(text: str) -> list[str]:
    return sorted(set(accessed(ast.parse(text))) - KNOWN)


FILES = [str(path.relative_to(PLUGIN)) for path in sorted(PLUGIN.rglob("*.py"))]


@pytest.mark.parametrize("file", [file for file in FILES if file not in STARTERS])
def test_every_attribute_that_our_code_uses_is_listed(file: str) -> None:
    assert unlisted((PLUGIN / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line", ["runner.a_new_buffer[:] = 0", "x = self.input_batch.split().a_new_buffer", "a_new_buffer"]
)
def test_one_that_is_not_listed_is_seen(line: str) -> None:
    assert unlisted("import numpy as np\nnp.arange(3)\n" + line) == (["a_new_buffer"] if "." in line else [])


@needs_vllm
@pytest.mark.parametrize("record", ATTRIBUTES, ids=lambda record: record.of)
def test_the_installed_vllm_has_what_is_listed(record: Attributes) -> None:
    module, _, kind = record.of.partition(":")
    names = record.names.split()
    assert set(names) - known_attributes(getattr(import_module(module), kind), names) == set()


def test_each_class_is_listed_once() -> None:
    assert len({record.of for record in ATTRIBUTES}) == len(ATTRIBUTES)


@needs_vllm
def test_a_renamed_buffer_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.v1.worker.block_table import BlockTable

    unapplied = [patch for patch in LEDGER if patch.target.endswith("_reserve_prefill_lookahead")]
    scheduler = import_module("vllm.v1.core.sched.scheduler").Scheduler
    stock = scheduler._reserve_prefill_lookahead
    monkeypatch.setattr(scheduler, "_reserve_prefill_lookahead", getattr(stock, "__wrapped__", stock))
    for name, value in list(vars(BlockTable).items()):
        if isinstance(value, FunctionType) and "num_blocks_per_row" in value.__code__.co_names:
            code = value.__code__
            renamed = tuple("renamed" if part == "num_blocks_per_row" else part for part in code.co_names)
            changed = FunctionType(code.replace(co_names=renamed), value.__globals__, name)
            monkeypatch.setattr(BlockTable, name, changed)
    with pytest.raises(PatchError, match=r"BlockTable of vLLM .* has no attribute 'num_blocks_per_row'") as caught:
        apply(unapplied, vllm.__version__, TESTED, CHECKED, ATTRIBUTES)
    assert "\n" not in str(caught.value)
