"""Settings of ``icarus bench agents``: declared once, for flags, YAML and the protocol."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from icarus import arguments, processor
from icarus.bench.agents import command
from icarus.bench.agents.fields import changed
from icarus.bench.agents.settings import CPU, GPU, PROFILES, QUICK, Settings
from icarus.bench.agents.workloads import Sizes
from icarus.errors import InputError


def parsed(*words: str) -> argparse.Namespace:
    parser = arguments.Parser(prog="agents")
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_every_setting_has_a_flag_with_help() -> None:
    parser = arguments.Parser(prog="agents")
    command.add_arguments(parser)
    declared = {action.dest: action for action in parser._actions if action.dest.startswith("settings.")}
    own = {f"settings.{entry.name}" for entry in fields(Settings)} - {"settings.sizes"}
    assert set(declared) == own | {f"settings.sizes.{entry.name}" for entry in fields(Sizes)}
    assert all(action.help for action in declared.values())


def test_what_is_not_given_is_the_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: False)
    assert command.settings_of(parsed()) == CPU
    assert command.settings_of(parsed("--quick")) == QUICK
    assert command.settings_of(parsed("--profile", "gpu")) == GPU
    monkeypatch.setattr(processor, "slow_in_bfloat16", lambda: True)
    expected = "float32" if torch.version.cuda is None else "bfloat16"
    assert command.settings_of(parsed()).dtype == expected
    assert command.settings_of(parsed("--dtype", "bfloat16")).dtype == "bfloat16"
    assert command.settings_of(parsed("--profile", "gpu")) == GPU


def test_flags_of_every_kind() -> None:
    words = "--rank 4 --models 2 8 --rates 0.5 1 --systems icarus base --window 30 --seed -1 --task-tokens 9 --turns 3"
    settings = command.settings_of(parsed(*words.split(), "--serve-flags", "--load-format dummy"))
    sizes = replace(CPU.sizes, task=9, turns=3)
    assert settings == replace(
        CPU,
        rank=4,
        models=(2, 8),
        rates=(0.5, 1.0),
        systems=("icarus", "base"),
        window=30.0,
        seed=-1,
        sizes=sizes,
        serve_flags=("--load-format", "dummy"),
    )


def test_yaml_stands_between_profile_and_flags(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("rank: 8\nmodels: [2, 4]\nsizes:\n  turns: 5\n  task: 99\n")
    settings = command.settings_of(parsed("--config", str(tmp_path / "settings.yaml"), "--rank", "2", "--turns", "7"))
    assert settings == replace(CPU, rank=2, models=(2, 4), sizes=replace(CPU.sizes, turns=7, task=99))


@pytest.mark.parametrize("profile", [*PROFILES.values(), QUICK])
def test_the_settings_of_a_report_are_a_configuration(profile: Settings, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(profile.as_dict(), indent=1))
    assert command.settings_of(parsed("--config", str(file))) == profile


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": 4}, "no setting 'ranks'"),
        ({"sizes": {"long": 4}}, "no setting 'long'"),
        ({"sizes": 4}, "sizes must be a mapping"),
        ({"sizes": {"turns": 0}}, "--turns must be a positive integer, not 0"),
        ({"sizes": {"system": -1}}, "--system-tokens must be an integer from 0, not -1"),
        ({"rank": True}, "--rank must be a positive integer, not True"),
        ({"rank": None}, "--rank must be a positive integer, not None"),
        ({"tight_tokens": 0}, "--tight-tokens must be a positive integer, not 0"),
        ({"serve_flags": ["--x", 1]}, "--serve-flags must be a list of words, not 1"),
        ({"seed": 0.5}, "--seed must be an integer, not 0.5"),
        ({"window": float("inf")}, "--window must be a number above 0, not inf"),
        ({"rates": "fast"}, "--rates must be a number above 0, not 'fast'"),
        ({"models": []}, "--models is empty or names one twice"),
        ({"models": [2, 2]}, "--models is empty or names one twice"),
        ({"base": 7}, "--base must be text, not 7"),
        ({"systems": ["icarus", "best"]}, "--systems must be one of stock, .*, not 'best'"),
        ({"workloads": ["sleep"]}, "--workloads must be one of react, .*, not 'sleep'"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        changed(CPU, values)


def test_sizes_are_checked_wherever_they_are_made() -> None:
    with pytest.raises(InputError, match="--output-tokens"):
        Sizes(output=0)
    assert Sizes(system=0).system == 0


@pytest.mark.parametrize("text", ["- rank", "rank: [", "7"])
def test_a_file_that_holds_no_settings_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(InputError, match=r"settings\.yaml"):
        command.settings_of(parsed("--config", str(tmp_path / "settings.yaml")))
