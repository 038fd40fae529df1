"""A run that claims to be complete fails where a test was skipped, unless the reason is a listed one."""

from __future__ import annotations

import pytest

from strict_skips import NO_CPU_TORCH

SKIPPED = {
    "a module": "import pytest\npytest.importorskip('no_such_package')\ndef test_it(): pass",
    "a test": "import pytest\ndef test_it(): pytest.importorskip('no_such_package')",
    "a mark": "import pytest\n@pytest.mark.skipif(True, reason='g++ is missing')\ndef test_it(): pass",
    "a fixture": "import pytest\n@pytest.fixture\ndef tool(): pytest.skip('none')\ndef test_it(tool): pass",
}
LISTED = f"import pytest\ndef test_it(): pytest.skip({NO_CPU_TORCH!r})"
EXPECTED = "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_it(): assert False"


def outcome(pytester: pytest.Pytester, source: str, *flags: str) -> int:
    pytester.makepyfile(source)
    return int(pytester.runpytest_inprocess("-p", "strict_skips", *flags).ret)


@pytest.mark.parametrize("source", SKIPPED.values(), ids=SKIPPED)
def test_a_skip_fails_only_where_skips_are_judged(pytester: pytest.Pytester, source: str) -> None:
    assert outcome(pytester, source, "--strict-skips") != pytest.ExitCode.OK
    assert outcome(pytester, source) in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


@pytest.mark.parametrize("source", [LISTED, EXPECTED], ids=["a listed reason", "an expected failure"])
def test_other_skips_pass(pytester: pytest.Pytester, source: str) -> None:
    assert outcome(pytester, source, "--strict-skips") == pytest.ExitCode.OK
