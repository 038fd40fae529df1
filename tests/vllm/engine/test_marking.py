"""Which requests are marked: those of verified adapters, by the verdict that stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from icarus import adapter
from icarus.vllm.engine.policy import Policy
from strict_skips import WITHOUT_VLLM
from tiny_models import tiny

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from vllm.lora.request import LoRARequest

from icarus.vllm.engine.marking import marked, to_load
from icarus.vllm.marks import SharedLoRARequest, VerifiedLoRARequest
from icarus.vllm.worker.copies import digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny().save_pretrained(folder / "base")
    adapter.save(adapter.attach(tiny(), rank=2), folder / "ours")
    adapter.save_conventional(adapter.attach_conventional(tiny(), rank=2), folder / "plain")
    return folder


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy(lambda: folder / "base")


def request(folder: Path, name: str, **fields: Any) -> LoRARequest:
    return LoRARequest(lora_name=name, lora_int_id=1, lora_path=str(folder / name), **fields)


def test_an_adapter_that_shares_is_marked(folder: Path, policy: Policy) -> None:
    ours = marked(policy, request(folder, "ours", base_model_name="base"))
    assert isinstance(ours, SharedLoRARequest)
    assert (ours.lora_name, ours.lora_int_id, ours.base_model_name) == ("ours", 1, "base")
    assert ours.sha256 == digest(folder / "ours")


def test_a_conventional_adapter_is_marked_as_verified_and_keeps_its_name(folder: Path, policy: Policy) -> None:
    plain = marked(policy, request(folder, "plain"))
    assert type(plain) is VerifiedLoRARequest
    assert (plain.adapter_id, plain.name, plain.sha256) == (1, "plain", digest(folder / "plain"))


def test_only_a_load_reads_files_again(folder: Path, policy: Policy) -> None:
    reload = request(folder, "ours", load_inplace=True)
    assert to_load(policy, reload)[0].load_inplace
    assert not marked(policy, reload).load_inplace


def test_each_verdict_has_a_generation_and_stands_when_its_load_has_succeeded(folder: Path, policy: Policy) -> None:
    reload = request(folder, "ours", load_inplace=True)
    first, later = marked(policy, reload), marked(policy, reload)
    again, verdict = to_load(policy, reload)
    assert isinstance(again, SharedLoRARequest)
    assert first.generation == later.generation < again.generation == verdict.generation
    assert marked(policy, reload).generation == first.generation, "until the load has succeeded"
