"""A request for an adapter that is refused is the client's error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icarus import adapter
from icarus.errors import InputError
from icarus.vllm.engine.policy import Policy
from strict_skips import WITHOUT_VLLM
from tiny_models import tiny

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from icarus.vllm.engine.attached_policy import POLICY
from icarus.vllm.server import requests


def process(self: Any, request_id: str, prompt: str, lora_request: Any = None) -> str:
    """As vLLM's, which takes more."""
    return f"{request_id} goes on"


@pytest.fixture
def front_end() -> Any:
    owner = SimpleNamespace(lora_config=SimpleNamespace())

    def folder() -> Path:
        raise InputError("the weights are unreadable, which no answer here depends on")

    POLICY.set(owner, Policy(folder, refusal="set --pipeline-parallel-size 1"))
    return owner


def test_a_refused_adapter_is_a_bad_request(tmp_path: Any, front_end: Any) -> None:
    folder = adapter.save(adapter.attach(tiny(), rank=2), tmp_path / "ours")
    wrapped = requests.wrap_process_inputs(process)
    request = LoRARequest(lora_name="sql", lora_int_id=1, lora_path=str(folder))
    for arguments, named in ((("r", "hello", request), {}), (("r", "hello"), {"lora_request": request})):
        with pytest.raises(VLLMValidationError, match="--pipeline-parallel-size 1"):
            wrapped(front_end, *arguments, **named)


def test_all_others_go_on(tmp_path: Any, front_end: Any) -> None:
    folder = adapter.save_conventional(adapter.attach_conventional(tiny(), rank=2), tmp_path / "plain")
    wrapped = requests.wrap_process_inputs(process)
    plain = LoRARequest(lora_name="plain", lora_int_id=1, lora_path=str(folder))
    assert wrapped(front_end, "a", "hello") == "a goes on"
    assert wrapped(front_end, "b", "hello", lora_request=plain) == "b goes on"
    front_end.lora_config = None
    assert wrapped(front_end, "c", "hello", plain) == "c goes on", "vLLM says that LoRA is off"
