"""Pytest plugin: with ``--strict-skips`` a test may be skipped only for a reason that is listed here.

A missing package or compiler then fails the run, which would otherwise pass without having tested anything.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator
from typing import Any

import pytest

NO_VLLM = "vLLM has no build for this system"
NO_CPU_TORCH = "about CPU builds of torch"
NO_CPU_VLLM = "about vLLM's CPU build"
NO_NAMESPACES = "this system gives programs no namespaces of their own"
ALLOWED = frozenset({NO_VLLM, NO_CPU_TORCH, NO_CPU_VLLM, NO_NAMESPACES})

# The folder tests/vllm is a namespace package of that name where vLLM is missing; it has no origin.
VLLM = getattr(importlib.util.find_spec("vllm"), "origin", None) is not None
WITHOUT_VLLM = "vLLM is not installed" if sys.platform == "linux" else NO_VLLM

needs_vllm = pytest.mark.skipif(not VLLM, reason=WITHOUT_VLLM)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail where a test is skipped for an unlisted reason")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    return _judged((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    return _judged((yield), collector.config)


def _judged(report: Any, config: pytest.Config) -> Any:
    """The report, failed if the test was skipped for an unlisted reason."""
    if config.getoption("strict_skips") and report.skipped and not hasattr(report, "wasxfail"):
        path, line, message = report.longrepr
        reason = message.removeprefix("Skipped: ")
        if reason not in ALLOWED:
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: skipped, and --strict-skips does not allow the reason: {reason}"
    return report
