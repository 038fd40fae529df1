"""Malformed adapters: that there are enough, what counts as a fault, and some of them by commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import malformed, shop, surfaces
from benchmarks.soak.malformed import Outcome
from benchmarks.soak.surfaces import BROKEN, MUTE, REFUSED, SERVED, Seen
from strict_skips import needs_vllm

LARGE = ("60 MB", "101 MB", "a million", "100,000", "hole behind", "huge rank")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> shop.Shop:
    return shop.tiny(tmp_path_factory.mktemp("stock"))


def test_there_are_enough_and_each_changes_something(stock: shop.Shop, tmp_path: Path) -> None:
    cases = malformed.cases()
    assert len(cases) >= 200
    assert {case.kind for case in cases} == {malformed.ICARUS, malformed.CONVENTIONAL}
    for number, case in enumerate(cases):
        if any(part in case.name for part in LARGE):
            continue
        sound = stock.specialists["sql"][0] if case.kind == "icarus" else stock.conventional["plain"][0]
        folder = case.make(sound, tmp_path / str(number))
        assert _listing(folder) != _listing(sound) or case.name.endswith("no README.md"), case.name
        if case.whole:
            assert all((folder / file).exists() for file in (malformed.CONFIG, malformed.WEIGHTS))


def _listing(folder: Path) -> list[tuple[str, int, bytes]]:
    """Names, kinds and contents."""
    return [
        (file.name, file.lstat().st_mode, file.read_bytes() if file.is_file() and not file.is_symlink() else b"")
        for file in sorted(folder.iterdir())
    ]


def case(expected: Outcome, kind: str = "icarus", says: str = "") -> malformed.Case:
    return malformed.Case("a case", lambda folder: None, expected, says, kind=kind)


@pytest.mark.parametrize(
    ("expected", "seen", "fault"),
    [
        (case(Outcome.REFUSED), Seen(REFUSED, "no", 1), ""),
        (case(Outcome.REFUSED), Seen(SERVED, "", 1), "served and not refused"),
        (case(Outcome.SERVED), Seen(REFUSED, "no", 1), "refused and not served"),
        (case(Outcome.EITHER), Seen(SERVED, "", 1), ""),
        (case(Outcome.EITHER), Seen(REFUSED, "no", 1), ""),
        (case(Outcome.EITHER), Seen(BROKEN, "it hung", 1), "it hung"),
        (case(Outcome.EITHER), Seen(MUTE, "400: NaN", 1), "loaded, and then 400"),
        (case(Outcome.HARMLESS), Seen(MUTE, "400: NaN", 1), ""),
        (case(Outcome.HARMLESS), Seen(BROKEN, "500", 1), "500"),
        (case(Outcome.REFUSED, says="rank"), Seen(REFUSED, "no", 1), "does not say 'rank'"),
        (case(Outcome.REFUSED), Seen(REFUSED, "Traceback ...", 1), "traceback"),
        (case(Outcome.REFUSED), Seen(REFUSED, "", 1), "no sentence"),
        (case(Outcome.REFUSED), Seen(REFUSED, "x" * 5000, 1), "5000 characters"),
        (case(Outcome.REFUSED), Seen(REFUSED, "a\x1b[2Jb", 1), "a terminal obeys"),
        (case(Outcome.SERVED), Seen(SERVED, "", 1000), "took 1000 s"),
        (case(Outcome.CONVENTIONAL), Seen(SERVED, "", 1), ""),
    ],
)
def test_what_is_a_fault_over_http(expected: malformed.Case, seen: Seen, fault: str) -> None:
    said = surfaces.fault(expected, seen, "http")
    assert fault in said
    assert bool(said) == bool(fault)


def test_a_command_that_works_for_long_is_a_fault() -> None:
    assert "took 40 s" in surfaces.fault(case(Outcome.SERVED), Seen(SERVED, "", 40), "start")
    assert surfaces.fault(case(Outcome.SERVED), Seen(SERVED, "", 40), "http") == ""


def test_a_conventional_adapter_may_never_share() -> None:
    sound = case(Outcome.SERVED, "conventional")
    assert surfaces.fault(sound, Seen(REFUSED, "plain LoRA; it can be served", 1), "verify") == ""
    assert "told wrongly" in surfaces.fault(sound, Seen(REFUSED, "plain LoRA", 1), "verify")
    lost = case(Outcome.REFUSED, "conventional")
    assert "told wrongly" in surfaces.fault(lost, Seen(REFUSED, "plain LoRA; it can be served", 1), "verify")
    assert surfaces.fault(sound, Seen(SERVED, "", 1), "verify")
    assert surfaces.fault(case(Outcome.CONVENTIONAL), Seen(SERVED, "", 1), "verify")


@needs_vllm
@pytest.mark.parametrize("kind", [malformed.ICARUS, malformed.CONVENTIONAL])
def test_some_malformed_adapters_by_commands(stock: shop.Shop, tmp_path: Path, kind: str) -> None:
    """``icarus verify`` and ``icarus serve`` refuse them with a sentence or take them, as is written beside each."""
    sound = stock.specialists["sql"][0] if kind == malformed.ICARUS else stock.conventional["plain"][0]
    picked = [case for case in malformed.some() if case.kind == kind]
    assert len(picked) >= 30
    faults = []
    for number, case in enumerate(picked):
        folder = case.make(sound, tmp_path / str(number))
        for way, ask in (("verify", surfaces.verify), ("start", surfaces.plan)):
            faults.append(surfaces.fault(case, ask(folder, stock.base), way))
    assert [said for said in faults if said] == []
