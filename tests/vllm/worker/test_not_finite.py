"""Blocks that hold NaN are cleaned before somebody else gets them, and no others. Needs vLLM, but starts no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from icarus.vllm.step_layout import DecoderRows
from icarus.vllm.worker import not_finite, runner_v1

BLOCKS, SIZE = 10, 4
NAN = float("nan")


class Runner:
    """The parts of vLLM's model runner that are looked at, with two layers and blocks of four slots."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, *, requests: dict[int, str]) -> None:
        self.caches = [torch.ones(BLOCKS, 2, SIZE) for _ in range(2)]
        layers = {str(number): SimpleNamespace(kv_cache=cache) for number, cache in enumerate(self.caches)}
        self.compilation_config = SimpleNamespace(static_forward_context={**layers, "other": SimpleNamespace()})
        self.kv_cache_config = SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=SIZE))]
        )
        self.table = SimpleNamespace(slot_mapping=SimpleNamespace(gpu=torch.full((64,), -1)))
        self.enable_prompt_embeds = self.supports_mm_inputs = False
        self.query_start_loc = SimpleNamespace(np=np.zeros(9, dtype=np.int32))
        names = {number: SimpleNamespace(lora_name=name) for number, name in requests.items()}
        self.input_batch = SimpleNamespace(
            block_table=SimpleNamespace(block_tables=[self.table]), lora_id_to_lora_request=names
        )

    def step(self, *rows: tuple[int, list[int], list[float]], decoders: DecoderRows | None = None) -> None:
        """One step: the LoRA id of each request, the slots that it writes, and what its rows come to."""
        slots = [slot for _, written, _ in rows for slot in written]
        self.table.slot_mapping.gpu[: len(slots)] = torch.tensor(slots)
        self.table.slot_mapping.gpu[len(slots) :] = -1
        lengths = [len(written) for _, written, _ in rows]
        self.query_start_loc.np[: len(rows) + 1] = [0, *np.cumsum(lengths)]
        self.input_batch.num_reqs = len(rows)
        self.input_batch.request_lora_mapping = np.array([lora_id for lora_id, _, _ in rows])
        values = torch.tensor([value for _, _, come_to in rows for value in come_to])
        hidden = torch.cat([values[:, None].expand(-1, 3), torch.full((5, 3), NAN)])  # what is behind is padding
        not_finite.note(self, hidden.to(self.dtype), runner_v1._Step(self, decoders))

    def hand_out(self, *blocks: int) -> set[int]:
        """Blocks that are clean after a step has got these."""
        request = SimpleNamespace(block_ids=([*blocks],), num_computed_tokens=0)
        return self.schedule([request])

    def schedule(self, new: list[Any], **cached: Any) -> set[int]:
        fields = {"req_ids": [], "new_block_ids": [], "num_computed_tokens": [], "resumed_req_ids": set()} | cached
        output = SimpleNamespace(scheduled_new_reqs=new, scheduled_cached_reqs=SimpleNamespace(**fields))
        not_finite.clean(self, output)
        clean = [{block for block in range(BLOCKS) if not cache[block].any()} for cache in self.caches]
        assert clean[0] == clean[1]
        return clean[0]


@pytest.fixture
def runner() -> Runner:
    return Runner(requests={1: "broken"})


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whom the log names."""
    names: list[str] = []
    monkeypatch.setattr(not_finite, "logger", SimpleNamespace(warning=lambda text, name: names.append(name)))
    return names


def test_blocks_of_spoiled_rows_are_cleaned_when_they_are_handed_out(runner: Runner) -> None:
    runner.step((0, [4, 5], [1.0, 2.0]), (1, [8, 9, 12], [1.0, NAN, float("inf")]))
    assert runner.hand_out(1) == set(), "sound rows wrote it"
    assert runner.hand_out(3) == {3}
    assert runner.hand_out(2, 3) == {2, 3}
    runner.caches[0][3] = runner.caches[1][3] = 1.0
    assert runner.hand_out(3) == {2}, "once"


def test_a_step_without_any_remembers_nothing(runner: Runner) -> None:
    runner.step((1, [8, 9], [1.0, -2.0]))
    assert not_finite._WATCH.get(runner) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_states_of_any_type(dtype: torch.dtype, value: float, runner: Runner, said: list[str]) -> None:
    runner.dtype = dtype
    runner.step((1, [4, 8], [6e4, 6e4]))  # together more than float16 holds
    assert (runner.hand_out(1, 2), said) == (set(), [])
    runner.step((1, [4, 8, 12], [6e4, value, -value]))
    assert (runner.hand_out(1, 2, 3), said) == ({2, 3}, ["Adapter 'broken'"])


def test_blocks_from_the_prefix_cache_are_left(runner: Runner) -> None:
    """Of the same adapter: what it reads there is what it wrote."""
    runner.step((1, [8, 12, 16, 20], [NAN] * 4))
    found = SimpleNamespace(block_ids=([2, 3],), num_computed_tokens=SIZE)
    assert runner.schedule([found]) == {3}
    resumed = {"req_ids": ["a", "b"], "new_block_ids": [([2, 4],), ([5],)], "num_computed_tokens": [5, 30]}
    assert runner.schedule([], **resumed, resumed_req_ids={"a"}) == {3, 5}
    assert runner.schedule([], req_ids=["a"], new_block_ids=[None], num_computed_tokens=[5]) == {3, 5}


def test_decoder_rows_write_nothing_and_are_reported(runner: Runner, said: list[str]) -> None:
    requests, sources, ends = (np.array(values) for values in ([0], [0], [2]))
    rows = DecoderRows(requests, sources, ends, np.array([0, 1]), behind=1, first=1)
    for _ in range(2):
        runner.step((0, [8], [1.0]), (0, [-1], [NAN]), decoders=rows)
    assert runner.hand_out(*range(BLOCKS)) == set()
    assert said == ["Adapter 'broken'"]


def test_the_base_model_is_reported_by_its_name(runner: Runner, said: list[str]) -> None:
    runner.step((0, [8], [NAN]))
    assert said == ["The base model"]


def test_other_ranks_of_a_pipeline_and_draft_models_return_several_tensors(runner: Runner) -> None:
    runner.step((1, [8], [1.0]))
    sound, spoiled = torch.ones(1, 3), torch.full((1, 3), NAN)
    not_finite.note(
        runner, SimpleNamespace(tensors={"hidden_states": sound, "residual": sound}), runner_v1._Step(runner, None)
    )
    assert not_finite._WATCH.get(runner) is None
    not_finite.note(runner, (sound, [spoiled]), runner_v1._Step(runner, None))
    assert not_finite._WATCH.get(runner) is None, "auxiliary states are of layers before the last one"
    not_finite.note(
        runner, SimpleNamespace(tensors={"hidden_states": sound, "residual": spoiled}), runner_v1._Step(runner, None)
    )
    assert runner.hand_out(2) == {2}


class Event:
    """Of a device that is done when it is asked for the second time."""

    asked, waited = 0, False

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def synchronize(self) -> None:
        self.waited = True


@pytest.mark.parametrize("handed_out", [[], [2]])
def test_elsewhere_than_on_a_cpu_only_who_gets_a_block_waits(runner: Runner, handed_out: list[int]) -> None:
    spoiled, slots = torch.tensor([True, False]), [(torch.tensor([8, 12]), SIZE)]
    watch, event = not_finite._Watch(), Event()
    watch.pending.append(not_finite._Rows(spoiled, slots, np.array([1, 0]), {1: "Adapter"}, event))
    not_finite._WATCH.set(runner, watch)
    assert runner.hand_out(*handed_out) == set(handed_out)
    assert event.waited is bool(handed_out)
    assert runner.hand_out(2) == {2}
    assert watch.pending == []
