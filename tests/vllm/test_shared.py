"""The mark, and what follows it: cache keys, KV events, pickles, sizes of buffers. Needs vLLM, but starts no engine."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import tiny
from icarus import adapter
from icarus.errors import AdapterError
from icarus.vllm.policy import Policy

pytest.importorskip("vllm.config")  # without vLLM this folder is a package of its name

from vllm.lora.request import LoRARequest

from icarus.vllm import engine, shared
from icarus.vllm.runner import renewing
from icarus.vllm.shared import SharedLoRARequest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny(head_dim=32).save_pretrained(folder / "base")
    adapter.save(adapter.attach(tiny(head_dim=32), rank=2), folder / "ours")
    adapter.save_conventional(adapter.attach_conventional(tiny(head_dim=32), rank=2), folder / "plain")
    return folder


def mark(folder: Path, name: str, number: int = 1, *, load: bool = False, **fields: Any) -> Any:
    request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder / name), **fields)
    return shared.marked(Policy(lambda: folder / "base"), request, load=load)


def test_only_a_verified_adapter_is_marked(folder: Path) -> None:
    ours, plain = mark(folder, "ours"), mark(folder, "plain", 2)
    assert isinstance(ours, SharedLoRARequest)
    assert ours.base_fingerprint == adapter.fingerprint(folder / "base")
    assert type(plain) is LoRARequest
    assert shared.decoded_ids({1: ours, 2: plain}) == [1]


def test_the_mark_survives_the_way_to_the_workers(folder: Path) -> None:
    ours = mark(folder, "ours", base_model_name="base")
    copy = pickle.loads(pickle.dumps(ours))
    assert type(copy) is SharedLoRARequest
    assert [getattr(copy, f) for f in copy.__struct_fields__] == [getattr(ours, f) for f in ours.__struct_fields__]
    assert (copy.lora_name, copy.lora_int_id, copy.base_model_name) == ("ours", 1, "base")


def test_blocks_carry_no_adapter(folder: Path) -> None:
    ours, plain = mark(folder, "ours"), mark(folder, "plain")
    assert (ours.adapter_id, ours.name) == (None, None), "what KV events and connectors read"
    keys = engine.keyed(lambda request: ["stock"])
    assert keys(SimpleNamespace(lora_request=ours)) == []
    assert keys(SimpleNamespace(lora_request=plain)) == ["stock"]
    assert keys(SimpleNamespace(lora_request=None)) == ["stock"]


def test_only_a_load_reads_files_again(folder: Path) -> None:
    assert mark(folder, "ours", load_inplace=True, load=True).load_inplace
    assert not mark(folder, "ours", load_inplace=True).load_inplace


def test_after_a_replacement_nobody_names_the_old_files(folder: Path) -> None:
    old, other, none = (SimpleNamespace(lora_request=r) for r in (mark(folder, "ours"), mark(folder, "plain", 2), None))
    loaded = mark(folder, "ours", load_inplace=True, load=True)
    loaded.lora_path = "new"
    runner = SimpleNamespace(
        requests={"a": old, "b": other, "c": none},
        input_batch=SimpleNamespace(lora_id_to_lora_request={1: old.lora_request, 2: other.lora_request}),
    )
    renewing(lambda self, request: True)(runner, loaded)
    running = runner.input_batch.lora_id_to_lora_request[1]
    assert [(type(r), r.lora_path, r.load_inplace) for r in (old.lora_request, running)] == [
        (SharedLoRARequest, "new", False)
    ] * 2
    assert other.lora_request.lora_path == str(folder / "plain")


def test_files_that_changed_since_are_refused_by_the_worker(folder: Path) -> None:
    ours, plain = mark(folder, "ours"), mark(folder, "plain")
    shared.check_files(ours, str(folder / "ours"), ["model.layers.0.self_attn.q_proj"])
    shared.check_files(plain, str(folder / "plain"), ["model.layers.0.self_attn.k_proj"])
    for request, name, module in ((ours, "ours", "k_proj"), (ours, "plain", "q_proj"), (plain, "ours", "q_proj")):
        with pytest.raises(AdapterError, match="load"):
            shared.check_files(request, str(folder / name), [f"model.layers.0.self_attn.{module}"])


@pytest.mark.parametrize("lora", [False, True])
def test_buffers_have_room_only_where_adapters_can_be_served(folder: Path, lora: bool) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from icarus.vllm import limits
    from icarus.vllm.plugin import register

    register()
    asked = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 256}
    model = str(folder / "base")
    config = EngineArgs(model=model, skip_tokenizer_init=True, enable_lora=lora, **asked).create_engine_config()
    sizes = config.scheduler_config
    if lora:
        assert (sizes.max_num_active_seqs, sizes.max_num_scheduled_tokens) == (8, 64)
        assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (16, 64 + 8 + limits.SCORED)
        assert limits.refusal(config) == ""
    else:
        assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (8, 64)
