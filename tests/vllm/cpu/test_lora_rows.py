"""LoRA over runs of rows, against a loop over rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icarus.vllm.cpu import lora_rows

M, R, INPUTS, OUTPUTS = 5, 4, 6, (3, 150, 2)
LONG = 32  # kMinMatrixRows
ROWS = st.lists(
    st.tuples(st.integers(-1, M - 1), st.one_of(st.integers(1, 3), st.integers(LONG - 1, LONG + 2))),
    min_size=1,
    max_size=8,
).map(lambda runs: [slot for slot, count in runs for _ in range(count)])
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def operator() -> None:
    if not lora_rows.available():
        pytest.skip("no C++ compiler")


class Layer:
    """The weights of a layer as vLLM keeps them, and its runs."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.a = [torch.randn(M, 1, R, INPUTS, generator=generator).to(dtype) for _ in OUTPUTS]
        self.b = [torch.randn(M, 1, size, R, generator=generator).to(dtype) for size in OUTPUTS]
        self.runs = lora_rows.no_runs(1000)

    def set_weights(self, *slots: int) -> None:
        for slot in slots or range(M):
            torch.ops.icarus.set_weights(self.a, self.b, self.runs, slot)

    def add(
        self, x: Tensor, slots: list[int], first: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        y = torch.zeros(len(slots), sum(OUTPUTS), dtype=dtype)
        lora_rows.find_runs(slots, self.runs)
        torch.ops.icarus.add_lora(y, x, self.a[0] if first is None else first)
        return y

    def by_row(self, x: Tensor, slots: list[int]) -> Tensor:
        """What is added to the outputs, row by row, in double precision."""
        out = torch.zeros(len(x), sum(OUTPUTS), dtype=torch.float64)
        for row, slot in enumerate(slots):
            if slot >= 0:
                own = x[row].double()
                out[row] = torch.cat(
                    [b[slot, 0].double() @ (a[slot, 0].double() @ own) for a, b in zip(self.a, self.b, strict=True)]
                )
        return out


@pytest.fixture
def layer() -> Iterator[Layer]:
    layer = Layer(torch.float32)
    layer.set_weights()
    yield layer
    torch.ops.icarus.forget(layer.a[0])


def some(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)


@settings(deadline=None)
@given(ROWS, st.sets(st.integers(0, M - 1)), st.integers(0, 2), st.tuples(*[st.sampled_from(TYPES)] * 3))
def test_any_rows_any_adapters(
    slots: list[int], empty: set[int], untouched: int, types: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    """Weights, inputs and outputs may each be of another type: heads in float32, adapters in another (--lora-dtype)."""
    layer = Layer(types[0])
    for slot in empty:
        for part in (*layer.a, *layer.b):
            part[slot] = 0
    layer.b[untouched][:] = 0  # as k and v of ICaRus adapters are
    layer.set_weights()
    x = some(len(slots), types[1])
    y = layer.add(x, slots, dtype=types[2])
    torch.ops.icarus.forget(layer.a[0])
    exact = set(types) == {torch.float32}
    torch.testing.assert_close(
        y.double(), layer.by_row(x, slots), rtol=1e-5 if exact else 0.05, atol=1e-5 if exact else 0.3
    )
    assert (y[torch.tensor(slots) < 0] == 0).all(), "rows without an adapter are left alone"


def test_a_row_is_the_same_in_any_batch(layer: Layer) -> None:
    slots = [3, -1, 1, 1, 3, 0]
    x = some(len(slots))
    together = layer.add(x, slots)
    for row, slot in enumerate(slots):
        assert torch.equal(layer.add(x[row : row + 1], [slot])[0], together[row])


def test_new_weights_in_a_slot_are_those_of_the_last_look(layer: Layer) -> None:
    """vLLM writes into its own memory; what was kept of the old weights must go."""
    new = Layer(torch.float32, seed=9)
    new.b[2][3] = 0
    slots = [3, 1, 2, 3, 0]
    x = some(len(slots))
    for mine, other in zip((*layer.a, *layer.b), (*new.a, *new.b), strict=True):
        mine[3, 0].copy_(other[3, 0])
    wanted = layer.by_row(x, slots)
    assert not torch.allclose(layer.add(x, slots).double(), wanted)
    layer.set_weights(3)
    torch.testing.assert_close(layer.add(x, slots).double(), wanted, rtol=1e-5, atol=1e-5)


def test_embeddings_have_their_a_behind_them() -> None:
    layer = Layer(torch.float32)
    wanted = layer.by_row(some(4), [2, 0, -1, 4])
    shrunk = torch.stack([layer.a[0][max(slot, 0), 0] @ row for slot, row in zip([2, 0, -1, 4], some(4), strict=True)])
    b = layer.b[:1]
    for slot in range(M):
        torch.ops.icarus.set_weights([], b, layer.runs, slot)
    y = layer.add(shrunk, [2, 0, -1, 4], first=b[0])
    torch.ops.icarus.forget(b[0])
    torch.testing.assert_close(y[:, : OUTPUTS[0]].double(), wanted[:, : OUTPUTS[0]], rtol=1e-5, atol=1e-5)


def test_unknown_and_forgotten_layers_add_nothing(layer: Layer) -> None:
    x = some(2)
    assert layer.add(x, [0, 1]).any()
    torch.ops.icarus.forget(layer.a[0])
    assert not layer.add(x, [0, 1]).any()


def test_one_with_runs_is_enough_among_layers_with_others(layer: Layer) -> None:
    """Sampled rows have runs of their own."""
    other = Layer(torch.float32)
    other.set_weights()
    x = some(2)
    assert not layer.add(x, [-1, -1]).any()
    assert other.add(x, [0, 1]).any()
    assert not layer.add(x, [-1, -1]).any()
    torch.ops.icarus.forget(other.a[0])
    assert layer.add(x, [0, 1]).any()


def test_a_step_with_fewer_rows_than_runs_stays_within_them(layer: Layer) -> None:
    lora_rows.find_runs([0] * 50, layer.runs)
    y = torch.zeros(3, sum(OUTPUTS))
    guard = y.clone()
    torch.ops.icarus.add_lora(y[:2], some(2), layer.a[0])
    assert y[:2].any()
    assert torch.equal(y[2:], guard[2:])


def test_rows_of_another_shape_are_refused(layer: Layer) -> None:
    """What they point to would be read and written otherwise."""
    with pytest.raises(RuntimeError, match="6 inputs and 155 outputs"):
        layer.add(torch.ones(2, INPUTS - 1), [0, 1])


def test_weights_can_be_looked_at_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        layer = Layer(torch.float32)
        layer.set_weights()
    layer.set_weights(0)
    torch.ops.icarus.forget(layer.a[0])


def test_a_compiled_graph_asks_for_the_runs_of_each_call(layer: Layer) -> None:
    @torch.compile(fullgraph=True)
    def step(x: Tensor) -> Tensor:
        y = x.sum(1, keepdim=True).expand(-1, sum(OUTPUTS)) * 0  # made in the graph, and then written to
        torch.ops.icarus.add_lora(y, x, layer.a[0])
        return y * 1

    x = some(3)
    for slots in ([0, 1, 2], [-1, -1, 4]):
        lora_rows.find_runs(slots, layer.runs)
        assert torch.equal(step(x), layer.add(x, slots))


@pytest.mark.parametrize(
    ("slots", "wanted"),
    [
        ([], []),
        ([-1, -1], []),
        ([-1, 2, 2], [(1, 3, 2)]),
        ([1, 0, 1], [(1, 2, 0), (0, 1, 1), (2, 3, 1)]),
        ([3] * 40 + [-1] + [1] * 2, [(41, 43, 1), (0, 40, 3)]),
    ],
)
def test_runs(slots: list[int], wanted: list[tuple[int, int, int]]) -> None:
    runs = lora_rows.no_runs(100)
    lora_rows.find_runs([0, 1, 0, 1], runs)
    lora_rows.find_runs(slots, runs)
    assert runs[0] == len(wanted)
    assert [tuple(run) for run in runs[1 : 1 + 3 * len(wanted)].view(-1, 3).tolist()] == wanted


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str) -> None:
    """Said once, and nothing is left."""
    said: list[str] = []
    monkeypatch.setattr(lora_rows.logger, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("ICARUS_HOME", str(tmp_path))
    for function in (lora_rows.available, lora_rows.load):
        function.cache_clear()
    try:
        assert not lora_rows.available()
        assert not lora_rows.available()
    finally:
        for function in (lora_rows.available, lora_rows.load):
            function.cache_clear()
    assert len(said) == 1
    assert compiler in said[0]
    assert not list((tmp_path / "operators").iterdir())


def test_what_another_system_left_in_the_cache_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ICARUS_HOME", str(tmp_path))
    monkeypatch.setattr(lora_rows, "_compile", lambda library: library.write_text("made again"))
    library = lora_rows._library()
    library.parent.mkdir()
    library.write_text("no library")
    with pytest.raises(OSError, match="Could not load this library"):
        lora_rows.load.__wrapped__()
    assert library.read_text() == "made again"


def test_only_touched_layers_are_looked_at(layer: Layer) -> None:
    """vLLM asks for every layer; of other types and shapes too, where no adapter of the step has it."""
    for part in layer.b:
        part[2] = 0
    layer.set_weights(2)
    assert not layer.add(torch.ones(2, 3), [2, 2]).any()
