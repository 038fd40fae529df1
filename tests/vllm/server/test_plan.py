"""What ``icarus serve`` calls vLLM with. Needs no vLLM."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from icarus import adapter, processor
from icarus.arguments import Parser
from icarus.errors import AdapterError, InputError
from icarus.vllm import abilities, settings
from icarus.vllm.server import folders, plan, serve, watch
from icarus.vllm.server.plan import Plan
from icarus.vllm_environment import has_accelerator
from saved import save_base
from specimens import CONVENTIONAL_DAMAGES, setting
from strict_skips import NO_CPU_TORCH, needs_vllm
from tiny_models import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    for name in ("team/sql", "team/chat", "plain"):
        adapter.save(adapter.attach(tiny(), rank=4), folder / name)
    plain = folder / "plain"
    config = json.loads((plain / "adapter_config.json").read_text())
    del config["icarus"]
    (plain / "adapter_config.json").write_text(json.dumps(config))
    return folder


def plan_of(*words: str, **environment: str) -> Plan:
    parser = Parser(prog="icarus serve")
    serve.add_arguments(parser)
    return plan.plan(parser.parse_args(words), environment)


def value(planned: Plan, flag: str) -> list[str]:
    """The words that follow a flag, up to the next one; once and not twice."""
    assert planned.flags.count(flag) == 1, planned.flags
    after = planned.flags[planned.flags.index(flag) + 1 :]
    end = next((index for index, word in enumerate(after) if word.startswith("--")), len(after))
    return after[:end]


def test_adapters_are_lora_modules_and_all_else_is_vllms(home: Path) -> None:
    planned = plan_of(
        *(str(home / "base"), "--adapters", f"sql={home}/team/sql", f"chat={home}/team/chat"),
        *("--port", "8123", "--adapters", f"plain={home}/plain", "--compilation-config.level", "0", "--enforce-eager"),
    )
    assert planned.flags[-5:] == ["--port", "8123", "--compilation-config.level", "0", "--enforce-eager"]
    modules = [json.loads(word) for word in value(planned, "--lora-modules")]
    assert modules == [
        {"name": name, "path": str(home / path), "base_model_name": str(home / "base")}
        for name, path in (("sql", "team/sql"), ("chat", "team/chat"), ("plain", "plain"))
    ]
    assert [bool(served.base_fingerprint) for served in planned.adapters] == [True, True, False]
    assert value(planned, "--max-lora-rank") == ["8"]
    assert value(planned, "--max-loras") == ["8"]
    assert value(planned, "--served-model-name") == [str(home / "base")]
    assert value(planned, "--enable-prompt-tokens-details") == value(planned, "--enable-lora") == []


@pytest.mark.parametrize("word", ["--max-lora-rank=64", "--max_lora_rank=64"])
def test_what_the_user_says_stands(home: Path, word: str) -> None:
    planned = plan_of(str(home / "base"), word, "--served-model-name", "a", "b", "--no-enable-prompt-tokens-details")
    assert "--max-lora-rank" not in planned.flags
    assert value(planned, "--served-model-name") == ["a", "b"]
    assert "--enable-prompt-tokens-details" not in planned.flags


def test_the_config_file_counts_as_said(home: Path, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("max_loras: 3\nserved-model-name: x\n")
    planned = plan_of(str(home / "base"), "--config", str(tmp_path / "flags.yaml"))
    assert not {"--max-loras", "--served-model-name"} & set(planned.flags)
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        plan_of(str(home / "base"), "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(("rank", "least"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (257, 320), (512, 512)])
def test_the_least_rank_with_room(rank: int, least: int) -> None:
    assert plan.allowed_rank(rank) == least


def test_no_rank_beyond_vllms() -> None:
    with pytest.raises(InputError, match="up to 512"):
        plan.allowed_rank(513)


@needs_vllm
def test_ranks_are_vllms() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == plan.LORA_RANKS


def test_environment(home: Path) -> None:
    base, adapters = str(home / "base"), ["--adapters", f"sql={home}/team/sql"]
    planned = plan_of(base, *adapters, "--allow-adapters-from", str(home / "plain"))
    assert planned.environment[folders.ALLOWED_VARIABLE].split(os.pathsep) == [str(home / "team"), str(home / "plain")]
    assert "VLLM_USE_V2_MODEL_RUNNER" not in planned.environment, "vLLM chooses the runner"
    assert planned.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_PLUGINS" not in planned.environment, "vLLM loads all plugins then"
    assert plan_of(base, VLLM_PLUGINS="a").environment["VLLM_PLUGINS"] == "a,icarus"
    assert plan_of(base, VLLM_PLUGINS="").environment["VLLM_PLUGINS"] == "icarus"
    assert "VLLM_PLUGINS" not in plan_of(base, VLLM_PLUGINS="icarus,a").environment


def test_data_parallel_engines_have_one_front_end_unless_asked_for_more(home: Path) -> None:
    base = str(home / "base")
    assert value(plan_of(base, "--data-parallel-size=2"), "--api-server-count") == ["1"]
    assert "--api-server-count" in plan_of(base, "-dp", "2").flags
    assert "--api-server-count" not in plan_of(base).flags
    several = plan_of(base, "--data-parallel-size", "2", "--api-server-count", "2")
    assert several.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0", "vLLM has both at once in no case"
    with pytest.raises(InputError, match="--api-server-count 1"):
        plan_of(base, "--api-server-count=2", "--adapter-dir", str(home / "team"))


def test_reading_once_is_a_setting_in_vllms_configuration(home: Path, tmp_path: Path) -> None:
    base = str(home / "base")
    assert value(plan_of(base, "--read-kv-once"), "--additional-config.icarus_read_kv_once") == ["true"]
    assert not [word for word in plan_of(base).flags if "additional-config" in word]
    beside = plan_of(base, "--read-kv-once", "--additional-config.other", "1").flags
    assert beside[-4:] == ["--additional-config.icarus_read_kv_once", "true", "--additional-config.other", "1"]
    (tmp_path / "flags.yaml").write_text("additional-config: {}\n")
    for words in (["--additional-config", "{}"], ["--config", str(tmp_path / "flags.yaml")]):
        with pytest.raises(InputError, match='add "icarus_read_kv_once": true'):
            plan_of(base, "--read-kv-once", *words)


@needs_vllm
def test_vllm_reads_the_setting_as_it_is_written(home: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = plan_of(str(home / "base"), "--read-kv-once", "--additional-config.other", "1").flags
    words = words[words.index("--additional-config.icarus_read_kv_once") :]
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    assert parsed.additional_config == {"icarus_read_kv_once": True, "other": 1}
    assert settings.reads_kv_once(SimpleNamespace(additional_config=parsed.additional_config))


def test_a_folder_makes_room_for_what_it_holds(home: Path, tmp_path: Path) -> None:
    for number in range(9):
        shutil.copytree(home / "team" / "sql", tmp_path / f"a{number}")
    (tmp_path / "a0" / "adapter_model.safetensors").write_text("no")
    planned = plan_of(str(home / "base"), "--adapter-dir", str(tmp_path), "--max-num-seqs", "4")
    assert value(planned, "--max-loras") == ["8"], "the sound ones"
    assert planned.environment[watch.WATCHED_VARIABLE] == str(tmp_path)
    assert planned.environment[folders.ALLOWED_VARIABLE] == str(tmp_path)


@pytest.mark.parametrize("damage", CONVENTIONAL_DAMAGES)
def test_a_bad_conventional_adapter_stops_the_start(damage: str, home: Path, tmp_path: Path) -> None:
    spoil, message = CONVENTIONAL_DAMAGES[damage]
    folder = Path(shutil.copytree(home / "plain", tmp_path / "plain"))
    spoil(folder)
    with pytest.raises(AdapterError, match=message):
        plan_of(str(home / "base"), "--adapters", f"plain={folder}")


def test_ranks_of_patterns_have_room(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "reads_patterns", lambda: True)
    folder = Path(shutil.copytree(home / "team" / "sql", tmp_path / "sql"))
    setting(rank_pattern={"nobody": 40})(folder)
    planned = plan_of(str(home / "base"), "--adapters", f"sql={folder}")
    assert value(planned, "--max-lora-rank") == ["64"]


def test_an_adapter_of_another_base_model_stops_the_start(home: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=9)
    with pytest.raises(AdapterError, match="trained on another base model"):
        plan_of(str(other), "--adapters", f"sql={home}/team/sql")


@pytest.mark.skipif(has_accelerator(), reason=NO_CPU_TORCH)
def test_on_a_slow_processor_weights_are_float32(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = str(home / "base")
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: False)
    assert "--dtype" not in plan_of(base).flags
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: True)
    planned = plan_of(base)
    assert value(planned, "--dtype") == ["float32"]
    assert "dtype    float32, as this processor has neither" in serve.announcement(planned, [])
    assert value(plan_of(base, "--dtype", "bfloat16"), "--dtype") == ["bfloat16"]
    config = json.loads((home / "base" / "config.json").read_text())
    (tmp_path / "quantised").mkdir()
    shutil.copy(home / "base" / "model.safetensors", tmp_path / "quantised")
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    assert "--dtype" not in plan_of(str(tmp_path / "quantised")).flags, "it says itself"
