"""The mark on a request, and what cache keys, KV events and workers see of it. Needs vLLM, but starts no engine."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from strict_skips import WITHOUT_VLLM

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.lora.request import LoRARequest

from icarus.vllm.marks import SharedLoRARequest, decoded_ids


def request(kind: type[Any], number: int = 1) -> Any:
    return kind(lora_name="sql", lora_int_id=number, lora_path="/nowhere", base_model_name="base")


def test_requests_with_the_mark_need_decoder_rows() -> None:
    assert decoded_ids({1: request(SharedLoRARequest), 2: request(LoRARequest, 2)}) == {1}


def test_the_mark_survives_the_way_to_the_workers() -> None:
    sent = SharedLoRARequest(
        lora_name="sql", lora_int_id=1, lora_path="/nowhere", base_model_name="base", sha256="abc", generation=3
    )
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is SharedLoRARequest
    assert [getattr(received, name) for name in received.__struct_fields__] == [
        getattr(sent, name) for name in sent.__struct_fields__
    ]
    assert (received.lora_name, received.sha256, received.generation) == ("sql", "abc", 3)


def test_kv_events_and_connectors_see_no_adapter() -> None:
    shared = request(SharedLoRARequest)
    assert (shared.adapter_id, shared.name) == (None, None)
    assert request(LoRARequest).adapter_id == 1
