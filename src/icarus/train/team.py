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
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml

from icarus import adapter, base_model
from icarus.errors import InputError
from icarus.train import data
from icarus.train.config import TRAIN
from icarus.train.run import last_checkpoint, report, train

PARTS = ("base", "encoder")
"""Names in the output folder that no member can have."""

Keys = dict[str, Any]


@dataclass(frozen=True)
class Team:
    """What the file says."""

    base: str
    output: Path
    prepare: Keys
    specialists: dict[str, Keys]
    common: Keys

    def settings(self, **own: Any) -> tuple[Any, Any]:
        """Of one run, as ``icarus train --config`` would read them.

        Raises:
            InputError: an unknown key, or a value that is wrong.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as recipe:
            yaml.safe_dump({**self.common, **own}, recipe)
            recipe.flush()
            return TRAIN.parse(["--config", recipe.name])


def read(file: Path) -> Team:
    """The team of a YAML file.

    Raises:
        InputError: the file cannot be read, or lacks something.
    """
    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The team in {file} cannot be read ({error.strerror}); name a YAML file.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not YAML ({' '.join(str(error).split())}); correct the file.") from error
    if not isinstance(keys, dict):
        raise InputError(f"{file} holds no settings; see docs/train.md for what a team's file has.")
    taken = {name: _taken(file, keys, name, kind) for name, kind in _KEYS.items()}
    members = taken["specialists"]
    for name, own in members.items():
        if name in PARTS or not str(name).replace("-", "").replace("_", "").isalnum():
            raise InputError(f"{file}: a specialist cannot be called {name!r}; choose a plain word besides {PARTS}.")
        if not isinstance(own, dict) or "data" not in own:
            raise InputError(f"{file}: the specialist {name!r} has no data; give it data: FILE.jsonl.")
    return Team(taken["base"], Path(taken["output"]).expanduser(), taken["prepare"] or {}, members, keys)


_KEYS: dict[str, tuple[type, ...]] = {
    "base": (str,),
    "output": (str,),
    "specialists": (dict,),
    "prepare": (dict, type(None)),
}


def _taken(file: Path, keys: Keys, name: str, kind: tuple[type, ...]) -> Any:
    value = keys.pop(name, None)
    if not isinstance(value, kind) or value in ("", {}):
        raise InputError(f"{file}: {name} is missing or of the wrong kind; see docs/train.md for what it is.")
    return value


def run(file: Path) -> dict[str, Any]:
    """Prepare the base model, train what is missing, and return what was done as the report."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--team trains in one process; start it without torchrun or accelerate.")
    team = read(file)
    members = {name: team.settings(base=team.base, output="x", **own) for name, own in team.specialists.items()}
    done: dict[str, Any] = {"output": str(team.output), "base": str(team.output / "base"), "specialists": {}}
    if (team.output / "base").exists():
        _kept(team.output / "base")
    else:
        done["prepared"] = _prepare(team, [config.data for config, _ in members.values()])
    for name, own in team.specialists.items():
        target = team.output / name
        if target.exists():
            _kept(target)
            continue
        keys = {"base": done["base"], "output": str(target), **own, "resume": last_checkpoint(target) is not None}
        done["specialists"][name] = report(train(*team.settings(**keys)))
    adapters = " ".join(f"{name}={team.output / name}" for name in team.specialists)
    print(f"icarus serve {done['base']} --adapters {adapters}", file=sys.stderr)
    return done


def _kept(folder: Path) -> None:
    print(f"{folder} is there and is kept; remove it to make it again.", file=sys.stderr)


def _prepare(team: Team, sources: Sequence[str]) -> dict[str, Any] | None:
    """Ordinary LoRA on the data of all members, merged into the base model."""
    target, rows = team.output / "encoder", team.output / "encoder.jsonl"
    keys: Keys = {"base": team.base, "output": str(target), "data": str(rows), "method": "lora", **team.prepare}
    config, sft = team.settings(**keys, resume=last_checkpoint(target) is not None)
    figures = None
    if not target.exists():
        count = sft.max_steps * sft.per_device_train_batch_size * sft.gradient_accumulation_steps
        team.output.mkdir(parents=True, exist_ok=True)
        mixed = islice(_mixed(_of_one_form(sources)), count if sft.max_steps > 0 else None)
        rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mixed), encoding="utf-8")
        figures = report(train(config, sft))
    model, codes = base_model.load(team.base, dtype="float32", device="cpu")
    merged: Any = adapter.merge(model, target)
    base_model.save(
        merged.to(getattr(torch, base_model.dtype_of(base_model.folder(team.base)))), codes, team.output / "base"
    )
    rows.unlink(missing_ok=True)
    return figures


def _of_one_form(sources: Sequence[str]) -> list[Sequence[Mapping[str, Any]]]:
    read = [data.read(source) for source in sources]
    for source, rows in zip(sources, read, strict=True):
        if rows[0].keys() != read[0][0].keys():
            raise InputError(
                f"The rows of {sources[0]} and {source} have different fields, and the base model is prepared on both; "
                "bring them to one form."
            )
    return list(read)


def _mixed(sources: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[Mapping[str, Any]]:
    """Rows of all sources in turns, until the last one ends."""
    for rows in zip_longest(*sources):
        yield from (row for row in rows if row is not None)
