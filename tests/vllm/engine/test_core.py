"""What the engine core does with marks: cache keys, room in buffers, chunks of scored prompts. Starts no engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icarus.errors import AdapterError
from strict_skips import WITHOUT_VLLM
from tiny_models import tiny

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.lora.request import LoRARequest

from icarus.vllm.engine import core, limits
from icarus.vllm.marks import SharedLoRARequest
from icarus.vllm.worker.adapters import stage, unstage


def lora(kind: type[Any] = SharedLoRARequest) -> Any:
    return kind(lora_name="sql", lora_int_id=1, lora_path="/nowhere")


def test_cache_keys_carry_no_adapter_that_shares() -> None:
    keys = core.wrap_gen_lora_extra_hash_keys(lambda request: ["vLLM's"])
    assert keys(SimpleNamespace(lora_request=lora())) == []
    assert keys(SimpleNamespace(lora_request=lora(LoRARequest))) == ["vLLM's"]
    assert keys(SimpleNamespace(lora_request=None)) == ["vLLM's"]


@pytest.mark.parametrize("enabled", [False, True])
def test_buffers_have_room_only_where_adapters_can_be_served(tmp_path: Path, enabled: bool) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from icarus.vllm.plugin import register

    register()
    tiny(head_dim=32).save_pretrained(tmp_path)
    asked = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 256}
    arguments = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, enable_lora=enabled, **asked)
    config = arguments.create_engine_config()
    sizes = config.scheduler_config
    if enabled:
        assert (sizes.max_num_active_seqs, sizes.max_num_scheduled_tokens) == (8, 64)
        assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (16, 64 + 8 + limits.MAX_SCORED_ROWS)
        assert limits.refusal(config) == ""
    else:
        assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (8, 64)


class Scheduler:
    """Asks for the chunks of one step after another."""

    def __init__(self) -> None:
        self.current_step = 0
        self.cut = core.wrap_reserve_prefill_lookahead(lambda self, request, computed, new: new)

    def chunks(self, *requests: Any, computed: int = 0, new: int = 200) -> list[int]:
        self.current_step += 1
        return [self.cut(self, request, computed, new) for request in requests]


def prompt(request: Any, scored: bool = True, chosen: Any = None) -> Any:
    params = SimpleNamespace(prompt_logprobs=0 if scored else None, prompt_logprob_token_ids=chosen)
    return SimpleNamespace(lora_request=request, sampling_params=params, num_prompt_tokens=500)


def test_scored_prompts_share_the_room_of_a_step() -> None:
    scheduler, room = Scheduler(), limits.MAX_SCORED_ROWS
    assert scheduler.chunks(prompt(lora()), prompt(lora()), prompt(lora())) == [200, room - 200, 0]
    assert scheduler.chunks(prompt(lora())) == [200], "each step has it anew"
    by_ids = prompt(lora(), scored=False, chosen=[[7]])
    assert scheduler.chunks(by_ids, by_ids) == [200, room - 200], "scores of chosen tokens need the same rows (V2)"


def test_other_prompts_and_decodes_are_not_cut() -> None:
    others = [prompt(lora(), scored=False), prompt(lora(LoRARequest)), prompt(None)]
    assert Scheduler().chunks(*others, new=400) == [400] * 3
    assert Scheduler().chunks(prompt(lora()), computed=500, new=400) == [400]


class Executor:
    """Two workers, of which one may fail to copy an adapter."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.sent = answers, list[Any]()

    def collective_rpc(self, method: Any, args: Any) -> list[str]:
        self.sent.append(method)
        return list(self.answers)


def test_all_workers_copy_an_adapter_or_none_keeps_it() -> None:
    sound, failing = Executor("", ""), Executor("", "the disk is full")
    core._stage(sound, lora())
    assert sound.sent == [stage]
    with pytest.raises(AdapterError, match="the disk is full"):
        core._stage(failing, lora())
    assert failing.sent == [stage, unstage]
