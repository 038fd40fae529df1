"""Who may share: adapters on disk, verified, conventional, damaged and replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from icarus import adapter
from icarus.adapter import fingerprints
from icarus.errors import AdapterError, InputError
from icarus.vllm import abilities
from icarus.vllm.engine import policy
from icarus.vllm.engine.policy import Policy
from specimens import edit
from tiny_models import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return adapter.save(adapter.attach(tiny(), rank=2), tmp_path / "shared")


@pytest.fixture
def conventional(tmp_path: Path) -> Path:
    return adapter.save_conventional(adapter.attach_conventional(tiny(), rank=2), tmp_path / "conventional")


def test_a_verified_adapter_shares(base: Path, shared: Path) -> None:
    verdict = Policy(lambda: base).decide(1, str(shared))
    assert verdict.shares
    assert verdict.base_fingerprint == adapter.fingerprint(base)


def test_a_conventional_adapter_does_not_and_no_fingerprint_is_computed(
    base: Path, conventional: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_digests", None)
    verdict = Policy(lambda: base, refusal="MLA").decide(1, str(conventional))
    assert not verdict.shares
    assert verdict.rank == 2


def test_a_conventional_adapter_is_verified_against_the_base_model(
    base: Path, conventional: Path, tmp_path: Path
) -> None:
    tiny(hidden_size=128).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="in the base model"):
        Policy(lambda: tmp_path / "other").decide(1, str(conventional))

    def unreadable() -> Path:
        raise InputError("The weights are on the Hub.")

    assert not Policy(unreadable).decide(1, str(conventional)).shares, "vLLM serves it, and has to tell"
    edit(lambda config: config.update(use_dora=True))(conventional)
    for folder in (lambda: base, unreadable):
        with pytest.raises(AdapterError, match="use_dora"):
            Policy(folder).decide(1, str(conventional))


@pytest.mark.parametrize("kind", ["shared", "conventional"])
def test_patterns_are_refused_where_vllm_does_not_read_them(
    kind: str, base: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(kind)
    edit(lambda config: config.update(alpha_pattern={"o_proj": 3}))(folder)
    monkeypatch.setattr(abilities, "reads_patterns", lambda: True)
    assert Policy(lambda: base).decide(1, str(folder)).shares is (kind == "shared")
    monkeypatch.setattr(abilities, "reads_patterns", lambda: False)
    with pytest.raises(AdapterError, match="has alpha_pattern, which this version of vLLM ignores"):
        Policy(lambda: base).decide(1, str(folder))


def test_an_adapter_of_a_classifier_has_a_head(base: Path, conventional: Path) -> None:
    edit(lambda config: config.update(modules_to_save=["score"]))(conventional)
    assert not Policy(lambda: base, heads=True).decide(1, str(conventional)).shares
    with pytest.raises(AdapterError, match="modules_to_save"):
        Policy(lambda: base).decide(1, str(conventional))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, shared: Path) -> None:
    tiny(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="base"):
        Policy(lambda: tmp_path / "other").decide(1, str(shared))


def test_a_damaged_adapter_is_refused(base: Path, shared: Path) -> None:
    weights = shared / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="adapter_model"):
        Policy(lambda: base).decide(1, str(shared))


def test_where_decoder_rows_cannot_run_it_is_refused_and_not_served_as_plain_lora(base: Path, shared: Path) -> None:
    with pytest.raises(AdapterError, match="--pipeline-parallel-size 1"):
        Policy(lambda: base, refusal="set --pipeline-parallel-size 1").decide(1, str(shared))


def test_decided_once(base: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Policy(lambda: base)
    verdict = judge.decide(1, str(shared))
    shutil.rmtree(shared)  # the weights are in memory
    monkeypatch.setattr(policy.adapter, "verify", None)
    assert judge.decide(1, str(shared)) is verdict


def test_loaded_again_it_is_verified_again(base: Path, shared: Path) -> None:
    judge = Policy(lambda: base)
    verdict = judge.decide(1, str(shared))
    (shared / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError):
        judge.decide(1, str(shared), again=True)
    assert judge.decide(1, str(shared)) is verdict, "what was loaded before is still there"


def test_under_its_id_an_adapter_can_be_replaced_by_another_of_its_kind_only(
    base: Path, shared: Path, conventional: Path, tmp_path: Path
) -> None:
    judge = Policy(lambda: base)
    assert judge.decide(1, str(shared)).shares
    other = shutil.copytree(shared, tmp_path / "other")
    assert judge.decide(1, str(other), again=True).path == str(other)
    with pytest.raises(AdapterError, match="another name"):
        judge.decide(1, str(conventional), again=True)
    assert judge.decide(1, str(other)).shares
    assert not judge.decide(2, str(conventional)).shares
    with pytest.raises(AdapterError, match="another name"):
        judge.decide(2, str(shared), again=True)


def test_a_replaced_conventional_adapter_begins_an_epoch(base: Path, conventional: Path, tmp_path: Path) -> None:
    """So that nobody finds K/V of a request that ran across the replacement."""
    judge = Policy(lambda: base)
    first = judge.decide(1, str(conventional))
    assert judge.decide(1, str(conventional), again=True).epoch == first.epoch, "the same files"
    other = Path(shutil.copytree(conventional, tmp_path / "other"))
    edit(lambda config: config.update(lora_alpha=1))(other)
    assert judge.judge(str(other), 1).epoch == first.epoch + 1
    assert judge.judge(str(other), 2).epoch == first.epoch, "it replaces nothing"
    judge.note(1, judge.judge(str(other), 1))
    back = judge.judge(str(conventional), 1)
    assert (back.sha256, back.epoch) == (first.sha256, first.epoch + 2)
    assert judge.judge(str(conventional), 3).epoch == first.epoch + 1


def test_a_request_that_names_the_folder_before_a_replacement_changes_nothing(
    base: Path, shared: Path, tmp_path: Path
) -> None:
    judge = Policy(lambda: base)
    judge.decide(1, str(shared))
    other = shutil.copytree(shared, tmp_path / "other")
    judge.decide(1, str(other), again=True)
    shutil.rmtree(shared)
    assert judge.decide(1, str(shared)).path == str(other)


def test_after_it_is_taken_out_an_id_is_free(base: Path, shared: Path, conventional: Path) -> None:
    judge = Policy(lambda: base)
    judge.decide(1, str(shared))
    judge.note(1, None)
    assert judge.known(1) is None
    assert not judge.decide(1, str(conventional)).shares


def test_paths_are_resolved_as_the_engine_does(base: Path, shared: Path) -> None:
    judge = Policy(lambda: base, locate={"owner/adapter": str(shared)}.__getitem__)
    assert judge.decide(1, "owner/adapter").shares


def test_the_fingerprint_of_the_base_is_computed_once(
    base: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Policy(lambda: base)
    judge.decide(1, str(shared))
    monkeypatch.setattr(fingerprints, "_digests", None)
    judge.decide(2, str(shutil.copytree(shared, tmp_path / "again")))


def test_a_look_ahead_says_what_a_decision_would_and_notes_nothing(
    base: Path, shared: Path, conventional: Path
) -> None:
    judge = Policy(lambda: base)
    noted = judge.decide(1, str(shared))
    with pytest.raises(AdapterError, match="another name"):
        judge.judge(str(conventional), 1)
    assert not judge.judge(str(conventional), 2).shares
    assert judge.decide(1, str(shared)) is noted
    assert judge.decide(2, str(shared)).shares, "2 was looked at and not decided"
