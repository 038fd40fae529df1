"""The mark, and what follows it: cache keys, KV events, pickles, sizes of buffers. Needs vLLM, but starts no engine."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import tiny
from icarus import adapter
from icarus.errors import AdapterError
from icarus.vllm.engine.policy import Policy
from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.lora.request import LoRARequest

from icarus.vllm.engine import core as engine
from icarus.vllm.engine.marking import marked, to_load
from icarus.vllm.marks import SharedLoRARequest, decoded_ids
from icarus.vllm.worker import adapters as in_worker
from icarus.vllm.worker.copies import digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny(head_dim=32).save_pretrained(folder / "base")
    adapter.save(adapter.attach(tiny(head_dim=32), rank=2), folder / "ours")
    adapter.save_conventional(adapter.attach_conventional(tiny(head_dim=32), rank=2), folder / "plain")
    return folder


def mark(folder: Path, name: str, number: int = 1, *, load: bool = False, **fields: Any) -> Any:
    request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder / name), **fields)
    policy = Policy(lambda: folder / "base")
    return to_load(policy, request)[0] if load else marked(policy, request)


def test_only_a_verified_adapter_is_marked(folder: Path) -> None:
    ours, plain = mark(folder, "ours"), mark(folder, "plain", 2)
    assert isinstance(ours, SharedLoRARequest)
    assert ours.sha256 == digest(folder / "ours")
    assert type(plain) is LoRARequest
    assert decoded_ids({1: ours, 2: plain}) == {1}


def test_the_mark_survives_the_way_to_the_workers(folder: Path) -> None:
    ours = mark(folder, "ours", base_model_name="base")
    copy = pickle.loads(pickle.dumps(ours))
    assert type(copy) is SharedLoRARequest
    assert [getattr(copy, f) for f in copy.__struct_fields__] == [getattr(ours, f) for f in ours.__struct_fields__]
    assert (copy.lora_name, copy.lora_int_id, copy.base_model_name) == ("ours", 1, "base")


def test_blocks_carry_no_adapter(folder: Path) -> None:
    ours, plain = mark(folder, "ours"), mark(folder, "plain")
    assert (ours.adapter_id, ours.name) == (None, None), "what KV events and connectors read"
    keys = engine.wrap_gen_lora_extra_hash_keys(lambda request: ["stock"])
    assert keys(SimpleNamespace(lora_request=ours)) == []
    assert keys(SimpleNamespace(lora_request=plain)) == ["stock"]
    assert keys(SimpleNamespace(lora_request=None)) == ["stock"]


def test_only_a_load_reads_files_again(folder: Path) -> None:
    assert mark(folder, "ours", load_inplace=True, load=True).load_inplace
    assert not mark(folder, "ours", load_inplace=True).load_inplace


def test_each_verdict_has_a_generation_and_stands_when_its_load_has_succeeded(folder: Path) -> None:
    policy = Policy(lambda: folder / "base")
    request = LoRARequest(lora_name="ours", lora_int_id=1, lora_path=str(folder / "ours"), load_inplace=True)
    first, later = marked(policy, request), marked(policy, request)
    again, verdict = to_load(policy, request)
    assert isinstance(first, SharedLoRARequest)
    assert isinstance(later, SharedLoRARequest)
    assert isinstance(again, SharedLoRARequest)
    assert first.generation == later.generation < again.generation == verdict.generation
    assert marked(policy, request).generation == first.generation, "until the load has succeeded"


def test_a_conventional_adapter_that_became_another_is_refused_by_the_worker(folder: Path) -> None:
    in_worker._check_conventional(folder / "plain")
    with pytest.raises(AdapterError, match="load it again"):
        in_worker._check_conventional(folder / "ours")


def test_a_worker_reads_copies_of_what_shares(folder: Path, tmp_path: Path) -> None:
    read: list[tuple[str, bytes]] = []

    def original(self: Any, request: Any) -> None:
        read.append((request.lora_path, Path(request.lora_path, "adapter_model.safetensors").read_bytes()))

    manager, load = SimpleNamespace(), in_worker.wrap_load_adapter(original)
    moved = shutil.copytree(folder / "ours", tmp_path / "moved")
    request = marked(Policy(lambda: folder / "base"), LoRARequest(lora_name="a", lora_int_id=1, lora_path=str(moved)))
    load(manager, request)
    shutil.rmtree(moved)
    load(manager, request)
    load(manager, mark(folder, "plain", 2))
    whole = (folder / "ours" / "adapter_model.safetensors").read_bytes()
    assert [weights for _, weights in read[:2]] == [whole, whole]
    assert str(moved) not in {path for path, _ in read}
    assert read[2][0] == str(folder / "plain")
    in_worker.wrap_remove_lora(lambda self, lora_id: True)(SimpleNamespace(lora_manager=manager), 1)
    with pytest.raises(AdapterError, match="cannot be copied"):
        load(manager, request)


@pytest.mark.parametrize("lora", [False, True])
def test_buffers_have_room_only_where_adapters_can_be_served(folder: Path, lora: bool) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from icarus.vllm.engine import limits
    from icarus.vllm.plugin import register

    register()
    asked = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 256}
    model = str(folder / "base")
    config = EngineArgs(model=model, skip_tokenizer_init=True, enable_lora=lora, **asked).create_engine_config()
    sizes = config.scheduler_config
    if lora:
        assert (sizes.max_num_active_seqs, sizes.max_num_scheduled_tokens) == (8, 64)
        assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (16, 64 + 8 + limits.MAX_SCORED_ROWS)
        assert limits.refusal(config) == ""
    else:
        assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (8, 64)
