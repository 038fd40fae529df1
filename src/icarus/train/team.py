"""``icarus train --team team.yaml``: a base model that is prepared for a team, and a specialist for each member.

The base model is fine-tuned once, by ordinary LoRA on the data of all members, and merged. Then it is frozen, and each
member's decoder is trained on it. It writes the one cache that all of them read, and whoever joins the team later needs
a decoder alone.

    base: smollm2-135m-instruct
    output: my-team
    prepare: {max_steps: 60}
    specialists:
      planner: {data: planner.jsonl}
      sql: {data: sql.jsonl, max_steps: 150}
    max_steps: 100
    per_device_train_batch_size: 8

All other keys are those of ``icarus train --config``: at the top for every run, below a member or ``prepare`` for that
run. In ``output``: ``base`` (a model folder), ``encoder`` (the adapter that was merged), and a folder for each member.
What is complete there is kept, and what was interrupted is resumed, when the command is given again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml

from icarus import adapter, atomic, base_model
from icarus.adapter.files import read_config
from icarus.errors import InputError
from icarus.train import data
from icarus.train.config import TRAIN
from icarus.train.run import check, last_checkpoint, report, run_directory, train

PARTS = ("base", "encoder")
"""Names in the output folder that no member can have."""

_OURS = {"base", "output", "method", "resume"}
"""Settings of ``icarus train`` that a team's runs are given."""

Keys = dict[str, Any]


@dataclass(frozen=True)
class Team:
    """What the file says."""

    base: str
    output: Path
    prepare: Keys
    specialists: dict[str, Keys]
    common: Keys

    def member(self, name: str, base: str) -> tuple[Any, Any]:
        """Settings of a specialist's run."""
        return self._settings(base, self.output / name, self.common | self.specialists[name])

    def preparation(self) -> tuple[Any, Any]:
        """Settings of the base model's run; evaluation is the members', unless ``prepare`` has its own."""
        common = {key: value for key, value in self.common.items() if not key.startswith("eval_")}
        rows = {"data": str(self.output / "encoder.jsonl"), "method": "lora"}
        return self._settings(self.base, self.output / "encoder", common | self.prepare | rows)

    def _settings(self, base: str, target: Path, keys: Keys) -> tuple[Any, Any]:
        """As ``icarus train --config`` would read them, and checked.

        Raises:
            InputError: an unknown key, or a value that is wrong.
        """
        own = {"base": base, "output": str(target), "resume": last_checkpoint(target) is not None}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as recipe:
            yaml.safe_dump(keys | own, recipe)
            recipe.flush()
            settings = TRAIN.parse(["--config", recipe.name])
        check(*settings)
        return settings


def read(file: Path) -> Team:
    """The team of a YAML file.

    Raises:
        InputError: the file cannot be read, or lacks something.
    """
    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The team in {file} cannot be read ({error.strerror}); name a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML ({' '.join(str(error).split())}); correct the file.") from error
    if not isinstance(keys, dict):
        raise InputError(f"{file} holds no settings; see docs/train.md for what a team's file has.")
    base, output = (_taken(file, keys, name, str) for name in ("base", "output"))
    members = _taken(file, keys, "specialists", dict)
    prepare = _taken(file, keys, "prepare", dict) if keys.get("prepare") else keys.pop("prepare", None) or {}
    for name, own in members.items():
        if name in PARTS or not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"{file}: a specialist cannot be called {name!r}; choose a plain word besides {PARTS}.")
        if not isinstance(own, dict) or "data" not in own:
            raise InputError(f"{file}: the specialist {name!r} has no data; give it data: FILE.jsonl.")
        _check_keys(file, f"the specialist {name!r}", own, _OURS)
    _check_keys(file, "the top", keys, _OURS | {"data"})
    _check_keys(file, "prepare", prepare, _OURS | {"data"})
    return Team(base, Path(output).expanduser(), prepare, members, keys)


def _taken(file: Path, keys: Keys, name: str, kind: type) -> Any:
    value = keys.pop(name, None)
    if not isinstance(value, kind) or not value:
        raise InputError(f"{file}: {name} is missing or of the wrong kind; see docs/train.md for what it is.")
    return value


def _check_keys(file: Path, where: str, keys: Keys, given: set[str]) -> None:
    if wrong := sorted(given & set(keys)):
        raise InputError(f"{file}: {where} has {wrong[0]}, which follows from the team; leave it out.")


def run(file: Path) -> dict[str, Any]:
    """Prepare the base model, train what is missing, and return what was done as the report.

    Raises:
        InputError: something cannot be used; what was complete before stays.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--team trains in one process; start it without torchrun or accelerate.")
    team = read(file)
    base = team.output / "base"
    sources = [team.member(name, team.base)[0].data for name in team.specialists]
    done: dict[str, Any] = {"output": str(team.output), "base": str(base), "specialists": {}}
    if (base / "config.json").is_file():
        _check_kept(team, base)
    else:
        done["prepared"] = _prepare(team, sources)
    for name in team.specialists:
        target = team.output / name
        if (target / adapter.CONFIG_NAME).is_file():
            print(f"{target} is there and is kept; remove it to make it again.", file=sys.stderr)
            continue
        done["specialists"][name] = report(train(*team.member(name, str(base))))
        shutil.rmtree(run_directory(target))  # or it would be resumed where the folder is removed
    adapters = " ".join(f"{name}={team.output / name}" for name in team.specialists)
    print(f"icarus serve {base} --adapters {adapters}", file=sys.stderr)
    return done


def _check_kept(team: Team, base: Path) -> None:
    """That a prepared base model is ours, and that the members that are there were trained on it."""
    if not (team.output / "encoder" / adapter.CONFIG_NAME).is_file():
        raise InputError(f"{base} is a model that no team prepared, as there is no encoder beside it; change output.")
    print(f"{base} is there and is kept; remove {team.output} to make all of it again.", file=sys.stderr)
    for name in team.specialists:
        if (team.output / name / adapter.CONFIG_NAME).is_file():
            adapter.verify(team.output / name, base)


def _prepare(team: Team, sources: Sequence[str]) -> dict[str, Any] | None:
    """Ordinary LoRA on the data of all members, merged into the base model."""
    for target in (team.output / name for name in team.specialists):
        for old in (target / adapter.CONFIG_NAME, run_directory(target)):
            if old.exists():
                raise InputError(f"{old} is of another base model, as {team.output / 'base'} is missing; remove it.")
    target, rows = team.output / "encoder", team.output / "encoder.jsonl"
    config, sft = team.preparation()
    figures = None
    if not (target / adapter.CONFIG_NAME).is_file():
        count = sft.max_steps * sft.train_batch_size * sft.gradient_accumulation_steps
        mixed = islice(_mixed(_of_one_form(sources)), count if sft.max_steps > 0 and not sft.packing else None)
        team.output.mkdir(parents=True, exist_ok=True)
        atomic.write_text(rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mixed))
        figures = report(train(config, sft))
        rows.unlink()
        shutil.rmtree(run_directory(target))
    _merge(team, target)
    return figures


def _merge(team: Team, encoder: Path) -> None:
    model, codes = base_model.load(team.base, dtype="float32", device="cpu")
    if (named := read_config(encoder).get("base_model_name_or_path")) != model.name_or_path:
        raise InputError(f"{encoder} was trained on {named}, and the team's base is {team.base}; remove that folder.")
    dtype = getattr(torch, base_model.dtype_of(base_model.folder(team.base)))
    merged: Any = adapter.merge(model, encoder)
    base_model.save(merged.to(dtype), codes, team.output / "base")


def _of_one_form(sources: Sequence[str]) -> list[Sequence[Mapping[str, Any]]]:
    read = [data.read(source) for source in sources]
    for source, rows in zip(sources, read, strict=True):
        if data.form(rows[0]) != data.form(read[0][0]):
            raise InputError(
                f"The rows of {sources[0]} and {source} have different forms, and the base model is prepared on both; "
                "bring them to one form."
            )
    return list(read)


def _mixed(sources: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    """Rows of all sources in turns, until the last one ends."""
    for rows in zip_longest(*sources):
        yield from (row for row in rows if row is not None)
