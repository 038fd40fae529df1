"""LoRA products over runs of rows, against a loop over rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icarus.vllm import products
from icarus.vllm.products import Layer, parts

M, R, INPUTS, OUTPUTS = 5, 4, 6, (3, 2, 3)
ROWS = st.lists(
    st.tuples(st.integers(-1, M - 1), st.one_of(st.integers(1, 3), st.integers(products.LONG - 1, products.LONG + 2))),
    min_size=1,
    max_size=8,
).map(lambda runs: [slot for slot, count in runs for _ in range(count)])


def weights(dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    a = [torch.randn(M, 1, R, INPUTS, generator=generator, dtype=dtype) for _ in OUTPUTS]
    b = [torch.randn(M, 1, size, R, generator=generator, dtype=dtype) for size in OUTPUTS]
    return a, b


def by_row(x: Tensor, slots: list[int], a: list[Tensor], b: list[Tensor]) -> Tensor:
    """What is added to the outputs, row by row, in double precision."""
    out = torch.zeros(len(x), sum(OUTPUTS), dtype=torch.float64)
    for row, slot in enumerate(slots):
        if slot >= 0:
            pieces = [d[slot, 0].double() @ (c[slot, 0].double() @ x[row].double()) for c, d in zip(a, b, strict=True)]
            out[row] = torch.cat(pieces)
    return out


@settings(deadline=None)
@given(ROWS, st.sets(st.integers(0, M - 1)), st.integers(0, 2), st.booleans())
def test_any_rows_any_adapters(slots: list[int], empty: set[int], untouched: int, half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    a, b = weights(dtype)
    for slot in empty:
        for part in (*a, *b):
            part[slot] = 0
    b[untouched][:] = 0  # as k and v of ICaRus adapters are
    layer = Layer(a, b)
    x = torch.randn(len(slots), INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.zeros(len(slots), sum(OUTPUTS), dtype=dtype)
    layer.add(y, x, parts(slots))
    wanted = by_row(x, slots, a, b)
    torch.testing.assert_close(y.double(), wanted, rtol=0.05 if half else 1e-5, atol=0.3 if half else 1e-5)
    assert (y[torch.tensor(slots) < 0] == 0).all(), "rows without an adapter are left alone"


def test_new_weights_in_a_slot_are_seen_once_it_is_refreshed() -> None:
    """vLLM writes into its own memory; what is kept from the old weights must go."""
    a, b = weights(torch.float32)
    layer = Layer(a, b)
    new_a, new_b = weights(torch.float32, seed=9)
    new_b[2][3] = 0
    slots = [3, 1, 2, 3, 0]
    x = torch.ones(len(slots), INPUTS)

    def result() -> Tensor:
        y = torch.zeros(len(slots), sum(OUTPUTS))
        layer.add(y, x, parts(slots))
        return y.double()

    before = result()
    for mine, new in zip((*a, *b), (*new_a, *new_b), strict=True):
        mine[3, 0].copy_(new[3, 0])
    torch.testing.assert_close(result(), before)
    layer.refresh(3)
    torch.testing.assert_close(result(), by_row(x, slots, a, b), rtol=1e-5, atol=1e-5)


def test_weights_can_be_refreshed_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        layer = Layer(*weights(torch.float32))
    layer.refresh(0)


@pytest.mark.parametrize(
    ("slots", "wanted"),
    [
        ([-1, -1], []),
        ([-1, 2, 2], [([1, 2], {2})]),
        ([0, 1, 2], [([0], {0}), ([1], {1}), ([2], {2})]),
        ([0, 1, 2, 0], [([0, 1, 2, 3], {0, 1, 2})]),
        ([0, 1, -1, 2, 0], [([0, 1, 3, 4], {0, 1, 2})]),
        ([3] * 40 + [1] * 2, [(list(range(40)), {3}), ([40, 41], {1})]),
        ([0, 1] + [-1] * 40 + [2, 3], [([0], {0}), ([1], {1}), ([42], {2}), ([43], {3})]),
    ],
)
def test_parts(slots: list[int], wanted: list[tuple[list[int], set[int]]]) -> None:
    rows = torch.arange(len(slots))
    for part in parts(slots):
        for slot in part.used:
            here = set(rows[part.rows].tolist())
            assert rows[part.of(slot)].tolist() == [row for row in sorted(here) if slots[row] == slot]
    assert [(rows[part.rows].tolist(), part.used) for part in parts(slots)] == wanted
