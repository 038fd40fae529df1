"""The computed cost of decoder rows, and the table of it on the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from icarus.bench.step_cost import H100, LLAMA_3_1_8B, added, fits, step_seconds

PAGE = Path(__file__).parents[2] / "docs" / "inside-vllm.md"
BATCHES = (1, 8, 32, 128, 256)
CONTEXTS = (1024, 4096, 16384, 65536)


@pytest.mark.parametrize(("requests", "percent"), [(1, 3), (32, 53)])
def test_of_llama_on_an_h100(requests: int, percent: int) -> None:
    assert round(100 * added(LLAMA_3_1_8B, H100, requests, 4096, paired=False)) == percent
    assert added(LLAMA_3_1_8B, H100, requests, 4096, paired=True) == 0


def test_a_step_reads_weights_once_and_caches_for_each_pass() -> None:
    device = replace(H100, bandwidth=2.0, arithmetic=1e9)
    model = replace(LLAMA_3_1_8B, multiplied=10.0, cache=1.0)
    assert step_seconds(model, device, requests=3, context=4) == pytest.approx(10 + 6)
    assert step_seconds(model, device, requests=3, context=4, rows=2, passes=2) == pytest.approx(10 + 12)


def test_where_arithmetic_takes_longer_every_row_costs() -> None:
    device = replace(H100, bandwidth=1e30, arithmetic=20.0)
    model = replace(LLAMA_3_1_8B, multiplied=10.0)
    assert step_seconds(model, device, requests=3, context=4) == pytest.approx(3)
    assert added(model, device, 3, 4, paired=True) == pytest.approx(1)


def test_what_fits() -> None:
    assert fits(LLAMA_3_1_8B, H100, 32, 4096)
    assert not fits(LLAMA_3_1_8B, H100, 32, 16384)


def cell(requests: int, context: int) -> str:
    if not fits(LLAMA_3_1_8B, H100, requests, context):
        return "does not fit"
    apart, together = (100 * added(LLAMA_3_1_8B, H100, requests, context, paired=paired) for paired in (False, True))
    return f"{apart:.0f} %, {together:.0f} % (computed)"


def test_the_page_has_what_is_computed() -> None:
    rows = [f"| {batch} | {' | '.join(cell(batch, context) for context in CONTEXTS)} |" for batch in BATCHES]
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8")
