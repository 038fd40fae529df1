"""``icarus verify``: its answer on a screen, in JSON and as an exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from home import BASE, Capture, sentence
from icarus import adapter, cli
from saved import save_adapter, save_base

pytestmark = pytest.mark.usefixtures("at_home")


@pytest.mark.parametrize("base", [[], BASE], ids=["alone", "with base"])
def test_verify_sound(base: list[str], capsys: Capture) -> None:
    assert cli.main(["verify", "one", *base, "--json", "-"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("one: sound; rank 4 on down_proj, gate_proj")
    assert any("give --base" in line for line in out) == (not base)
    report = json.loads(out[-1])
    assert report == {
        "adapter": "one",
        "sound": True,
        "problems": [],
        "rank": 4,
        "targets": ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"],
        "base_fingerprint": adapter.verify("one").base_fingerprint,
    }


def test_verify_prints_whatever_a_config_calls_its_base_model(tmp_path: Path, capsys: Capture) -> None:
    """Such as characters that no terminal takes, or commands to it."""
    config = save_adapter(tmp_path / "odd") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "\ud800\x1b[2J"}))
    assert cli.main(["verify", str(tmp_path / "odd")]) == 0
    assert "base model '\\ud800\\x1b[2J', fingerprint" in capsys.readouterr().out


def test_verify_an_adapter_of_another_base_model(tmp_path: Path, capsys: Capture) -> None:
    words = ["verify", str(save_adapter(tmp_path / "bad")), "--json", str(tmp_path / "report.json")]
    other = save_base(tmp_path / "other", seed=5)
    assert cli.main([*words, "--base", str(other)]) == 1
    out, err = capsys.readouterr()
    assert f"must not share a KV cache with {other}, for the reason above" in sentence(err)
    report = json.loads((tmp_path / "report.json").read_text())
    (problem,) = report["problems"]
    assert out == f"{tmp_path / 'bad'}: {problem}\n"
    assert "another base model" in problem
    assert report["sound"] is False


def without_marker(folder: Path, **fields: Any) -> Path:
    """A plain LoRA."""
    config = save_adapter(folder) / "adapter_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "icarus"} | fields))
    return folder


@pytest.mark.parametrize("base", [[], BASE], ids=["alone", "with base"])
def test_verify_says_what_a_conventional_adapter_is(base: list[str], tmp_path: Path, capsys: Capture) -> None:
    words = ["verify", str(without_marker(tmp_path / "plain")), *base, "--json", str(tmp_path / "report.json")]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "must not share a KV cache, for the reason above" in sentence(err)
    reason, kind, *more = out.splitlines()
    assert "no ICaRus marker" in reason
    assert "a conventional adapter, rank 4 on down_proj" in kind
    assert "it can be served, with a cache of its own" in kind
    assert more == ([] if base else ["not checked against its base model; give --base to do so"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["sound"], report["kind"], report["served"], report["rank"]) == (False, "conventional", True, 4)


def test_verify_says_why_a_conventional_adapter_cannot_be_served(tmp_path: Path, capsys: Capture) -> None:
    plain = without_marker(tmp_path / "plain", use_dora=True, lora_alpha=None)
    assert cli.main(["verify", str(plain), "--json", "-"]) == 1
    reason, kind, *problems, report = capsys.readouterr().out.splitlines()
    assert "no ICaRus marker" in reason
    assert kind.endswith("a conventional adapter, which cannot be served either:")
    assert [word in problem for word, problem in zip(("use_dora", "lora_alpha"), problems, strict=True)] == [True] * 2
    assert json.loads(report)["served"] is False


def test_verify_prints_some_of_very_many_reasons(tmp_path: Path, capsys: Capture) -> None:
    odd = {f"odd.{number}": torch.ones(1) for number in range(100)}
    save_file(odd, save_adapter(tmp_path / "odd") / "adapter_model.safetensors")
    assert cli.main(["verify", str(tmp_path / "odd"), "--json", str(tmp_path / "report.json")]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 21
    assert "80 more" in out
    assert "for the 100 reasons above" in sentence(err)
    assert len(json.loads((tmp_path / "report.json").read_text())["problems"]) == 100
