"""The policy of an engine core and of a front end: what it refuses, and which weights it verifies against."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from icarus import adapter
from icarus.errors import AdapterError, InputError
from strict_skips import WITHOUT_VLLM
from tiny_models import tiny

pytest.importorskip("vllm.config", reason=WITHOUT_VLLM)

from icarus.vllm.engine import attached_policy, limits
from icarus.vllm.engine.attached_policy import policy_of


def owner(model: Path | str = "/nowhere", *caches: str, **sizes: Any) -> Any:
    """A front end, or with ``caches`` an engine core whose model keeps these."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision="main", runner_type="generate"),
        load_config=SimpleNamespace(download_dir=None),
        scheduler_config=SimpleNamespace(**{"max_num_active_seqs": 8, **sizes}),
    )
    if not caches:
        return SimpleNamespace(vllm_config=config)
    groups = [SimpleNamespace(kv_cache_spec=type(name, (), {})()) for name in caches]
    scheduler = SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=groups))
    return SimpleNamespace(vllm_config=config, scheduler=scheduler)


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "refusal", lambda config: "")


def test_an_owner_has_one_policy() -> None:
    one, other = owner(), owner()
    assert policy_of(one) is policy_of(one)
    assert policy_of(one) is not policy_of(other)


def test_the_first_reason_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy_of(owner("/nowhere", "FullAttentionSpec")).refusal == ""
    assert "MambaSpec" in policy_of(owner("/nowhere", "FullAttentionSpec", "MambaSpec")).refusal
    assert policy_of(owner()).refusal == "", "a front end does not know the caches"
    assert "buffers" in policy_of(owner("/nowhere", "MambaSpec", max_num_active_seqs=None)).refusal
    monkeypatch.setattr(limits, "refusal", lambda config: "set --pipeline-parallel-size 1")
    assert policy_of(owner(max_num_active_seqs=None)).refusal == "set --pipeline-parallel-size 1"


def test_adapters_are_verified_against_the_weights_that_the_engine_has_loaded(tmp_path: Path) -> None:
    folder = adapter.save(adapter.attach(tiny(), rank=2), tmp_path / "sql")
    tiny().save_pretrained(tmp_path / "base")
    tiny(seed=5).save_pretrained(tmp_path / "other")
    assert policy_of(owner(tmp_path / "base")).decide(1, str(folder)).shares
    with pytest.raises(AdapterError, match="base"):
        policy_of(owner(tmp_path / "other")).decide(1, str(folder))


def test_weights_from_the_hub_are_those_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter.save(adapter.attach(tiny(), rank=2), tmp_path / "sql")
    tiny().save_pretrained(tmp_path / "base")
    asked: list[Any] = []

    def snapshot(model: str, patterns: list[str], **options: Any) -> Path:
        asked.append((model, options))
        return tmp_path / "base"

    monkeypatch.setattr(attached_policy.hub, "snapshot", snapshot)
    policy = policy_of(owner("owner/base"))
    assert [policy.decide(number, str(folder)).shares for number in (1, 2)] == [True, True]
    assert asked == [("owner/base", {"revision": "main", "cache": None, "cached": True})], "once"


def test_weights_that_are_nowhere_are_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter.save(adapter.attach(tiny(), rank=2), tmp_path / "sql")

    def snapshot(*args: Any, **options: Any) -> Path:
        raise attached_policy.hub.DownloadError("offline")

    monkeypatch.setattr(attached_policy.hub, "snapshot", snapshot)
    with pytest.raises(InputError, match="serve the base model from a local folder"):
        policy_of(owner("owner/base")).decide(1, str(folder))
