"""Settings of ``icarus bench agents``: declared once, for flags, YAML and the protocol."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from icarus import arguments, processor
from icarus.bench.agents import command
from icarus.bench.agents.settings import WORKLOADS, Settings, profile
from icarus.bench.agents.workloads import MAKERS
from icarus.errors import InputError

CPU = Settings()


@pytest.fixture(autouse=True)
def quick_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU profile's dtype follows the processor."""
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: False)


def parsed(*words: str) -> argparse.Namespace:
    parser = arguments.Parser(prog="agents")
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_help_lists_every_setting_and_the_commands_own_flags() -> None:
    parser = arguments.Parser(prog="agents")
    command.add_arguments(parser)
    text = parser.format_help()
    assert all(f"--{entry.name.replace('_', '-')} " in text for entry in fields(Settings))
    assert all(entry.metadata["help"] for entry in fields(Settings))
    assert "--redraw" in text


def test_every_workload_has_a_maker() -> None:
    assert tuple(MAKERS) == WORKLOADS


def test_what_is_not_given_is_the_profiles() -> None:
    assert command.settings_of(parsed()) == CPU
    assert command.settings_of(parsed("--quick")) == replace(CPU, **profile("quick"))
    assert command.settings_of(parsed("--profile", "gpu")) == replace(CPU, **profile("gpu"))


def test_the_cpu_profiles_dtype_suits_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: True)
    expected = "float32" if torch.version.cuda is None else "bfloat16"
    assert command.settings_of(parsed()).dtype == expected
    assert command.settings_of(parsed("--dtype", "bfloat16")).dtype == "bfloat16"
    assert command.settings_of(parsed("--profile", "gpu")).dtype == "bfloat16"


def test_flags_of_every_kind() -> None:
    words = "--rank 4 --models 2 8 --rates 0.5 1 --systems icarus base --window 30 --seed -1 --task-tokens 9 --turns 3"
    settings = command.settings_of(parsed(*words.split(), "--serve-flags", "--load-format dummy"))
    assert settings == replace(
        CPU,
        rank=4,
        models=[2, 8],
        rates=[0.5, 1.0],
        systems=["icarus", "base"],
        window=30.0,
        seed=-1,
        task_tokens=9,
        turns=3,
        serve_flags="--load-format dummy",
    )


def test_yaml_stands_between_profile_and_flags(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("rank: 8\nmodels: [2, 4]\nturns: 5\ntask_tokens: 99\n")
    settings = command.settings_of(parsed("--config", str(tmp_path / "settings.yaml"), "--rank", "2", "--turns", "7"))
    assert settings == replace(CPU, rank=2, models=[2, 4], turns=7, task_tokens=99)


@pytest.mark.parametrize("name", ["cpu", "gpu", "quick"])
def test_the_settings_of_a_report_are_a_configuration(name: str, tmp_path: Path) -> None:
    settings = replace(CPU, **profile(name))
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings.as_dict(), indent=1))
    assert command.settings_of(parsed("--config", str(file))) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": 4}, "no setting 'ranks'"),
        ({7: 4}, "no setting 7"),
        ({"turns": 0}, "--turns must be a positive integer, not 0"),
        ({"system_tokens": -1}, "--system-tokens must be an integer from 0, not -1"),
        ({"rank": True}, "--rank must be a positive integer, not True"),
        ({"rank": None}, "--rank must be a positive integer, not None"),
        ({"tight_tokens": 0}, "--tight-tokens must be a positive integer, not 0"),
        ({"budgets": ["tight"], "roomy_tokens": 512}, "--roomy-tokens has no effect without roomy among --budgets"),
        ({"budgets": ["roomy"], "tight_tokens": 512}, "--tight-tokens has no effect without tight among --budgets"),
        ({"workloads": ["react"], "trajectories": "x"}, "--trajectories has no effect without plan-act-reflect among"),
        ({"serve_flags": ["--x"]}, r"--serve-flags must be text, not \['--x'\]"),
        ({"seed": 0.5}, "--seed must be an integer, not 0.5"),
        ({"window": float("inf")}, "--window must be a number above 0, not inf"),
        ({"rates": "fast"}, "--rates.*'fast'"),
        ({"models": 8}, "--models must be a list, not 8"),
        ({"rates": ["fast"]}, "--rates must be a number above 0, not 'fast'"),
        ({"models": []}, "--models is empty or names one twice"),
        ({"models": [2, 2]}, "--models is empty or names one twice"),
        ({"base": 7}, "--base must be text, not 7"),
        ({"systems": ["icarus", "best"]}, "--systems must be one of stock, .*, not 'best'"),
        ({"workloads": ["sleep"]}, "--workloads must be one of react, .*, not 'sleep'"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=message):
        command.settings_of(parsed("--config", str(file)))


def test_settings_are_checked_wherever_they_are_made() -> None:
    with pytest.raises(InputError, match="--output-tokens"):
        Settings(output_tokens=0)
    assert Settings(system_tokens=0).system_tokens == 0


@pytest.mark.parametrize("text", ["- rank", "rank: [", "7"])
def test_a_file_that_holds_no_settings_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(InputError, match=r"settings\.yaml"):
        command.settings_of(parsed("--config", str(tmp_path / "settings.yaml")))
