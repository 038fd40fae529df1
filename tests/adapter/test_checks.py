"""Nothing that must not share a KV cache passes, and each refusal says why; what is sound passes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from icarus import adapter
from icarus.adapter import checks
from icarus.errors import AdapterError
from specimens import (
    DAMAGES,
    IDS,
    Damage,
    add_layer,
    both,
    deepseek,
    drop_module,
    gpt2,
    hf,
    kv_tensors,
    llama,
    marker,
    phi3,
    poison,
    qwen2_moe,
    qwen3_moe,
    resize,
    setting,
    specialist,
    tensors,
)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A sound adapter of rank 4 on ``llama()``."""
    return adapter.save(specialist(llama()), tmp_path / "good")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


WRITE_KV = """k_proj v_proj qkv_proj Wqkv W_pack c_attn query_key_value in_proj in_proj_qkvz kv_a_proj_with_mqa
kv_b_proj key value kv_proj to_k to_kv wk Wv linear_k attn.qkv x_proj dt_proj model.layers.3.self_attn.k_proj"""
READ_KV = """q_proj o_proj gate_up_proj down_proj q_a_proj q_b_proj wq_b dense dense_h_to_4h fc1 w1 w2 c_proj c_fc
out_proj g_proj kv.o_proj lm_head"""


@pytest.mark.parametrize("name", WRITE_KV.split())
def test_feeds_kv(name: str) -> None:
    assert checks.feeds_kv(name)


@pytest.mark.parametrize("name", READ_KV.split())
def test_does_not_feed_kv(name: str) -> None:
    assert not checks.feeds_kv(name)


def test_info(good: Path) -> None:
    info = checks.verify(good, llama())
    file = load_file(good / "adapter_model.safetensors")
    assert info == checks.AdapterInfo(
        directory=good,
        base_model=None,
        rank=4,
        alpha=8.0,
        targets=("down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"),
        base_fingerprint=adapter.fingerprint(llama()),
        tensors=20,
        bytes=sum(4 * tensor.numel() for tensor in file.values()),
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, good: Path) -> None:
    assert checks.problems(good) == []
    spoil, message = DAMAGES[damage]
    spoil(good)
    assert checks.problems(good)
    with pytest.raises(AdapterError, match=message) as error:
        checks.verify(good)
    assert str(good) in str(error.value)
    assert "; " in checks.problems(good)[0], "reason; remedy"


def test_all_problems_are_listed(good: Path) -> None:
    both(setting(use_dora=True), marker(version=7), tensors(poison(float("nan"))), tensors(kv_tensors))(good)
    reasons = checks.problems(good)
    assert len(reasons) == 4
    for word in ("version 7", "use_dora", "NaN", "k_proj"):
        assert len([problem for problem in reasons if word in problem]) == 1
    with pytest.raises(AdapterError, match=r"version 7.*3 more problems"):
        checks.verify(good)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tensors(resize), r"o_proj is \(32, 16\) here and \(32, 32\) in the base"),
        (tensors(drop_module), "weights of model.layers.0.self_attn.o_proj, which target_modules names, are missing"),
        (tensors(add_layer), "model.layers.7.self_attn.o_proj, which the base model lacks"),
        (marker(base_fingerprint="0" * 64), "trained on another base model .*fingerprint 000000000000"),
    ],
)
def test_mismatch_with_the_base_is_named(
    damage: Damage, message: str, loaded: bool, good: Path, base_folder: Path
) -> None:
    base = llama() if loaded else base_folder
    assert checks.problems(good, base) == []
    damage(good)
    assert checks.problems(good) == [], "only the base tells"
    with pytest.raises(AdapterError, match=message):
        checks.verify(good, base)


def test_base_whose_checkpoint_has_other_names(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.save_pretrained(
        tmp_path / "base"
    )  # as on the Hub: h.0..., where the model has transformer.h.0...
    directory = adapter.save(specialist(model), tmp_path / "adapter")
    assert checks.problems(directory, tmp_path / "base") == []
    tensors(lambda t: t.pop(next(iter(t))))(directory)
    assert checks.problems(directory, tmp_path / "base") != []


@pytest.mark.parametrize("build", [phi3, qwen3_moe, qwen2_moe, deepseek, gpt2])
def test_other_models_verify_against_their_folder(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build().eval()
    model.save_pretrained(tmp_path / "base")
    peft_model = specialist(model)
    directory = adapter.save(peft_model, tmp_path / "adapter")
    assert checks.problems(directory, tmp_path / "base") == []
    loaded = adapter.load(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), directory, "again")
    assert torch.equal(loaded(IDS).logits, peft_model.eval()(IDS).logits)


@pytest.mark.parametrize("module", ["adapter.checks", "adapter"])
def test_verify_needs_neither_peft_nor_transformers(module: str, good: Path, base_folder: Path) -> None:
    code = (
        f"import sys; import icarus.{module} as module; module.verify(sys.argv[1], sys.argv[2]);"
        "print([name for name in ('peft', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(good), str(base_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_known_fingerprint_saves_the_hashing(good: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = checks.verify(good, base_folder).base_fingerprint

    def hashing(*arguments: object) -> str:
        raise AssertionError("the base model is hashed")

    monkeypatch.setattr(checks, "fingerprint", hashing)
    for base in (base_folder, llama(), None):
        assert checks.problems(good, base, base_fingerprint=mark) == []
        (problem,) = checks.problems(good, base, base_fingerprint="0" * 64)
        assert "another base model" in problem
    with pytest.raises(AssertionError, match="hashed"):
        checks.problems(good, base_folder)


def test_base_folder_without_a_config_is_told_by_its_checkpoint(good: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    assert checks.problems(good, tmp_path / "bare") == []
    tensors(drop_module)(good)
    (problem,) = checks.problems(good, tmp_path / "bare")
    assert "are missing" in problem
