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
What is complete there is kept as it is, and what was interrupted is resumed, when the command is given again.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import yaml

from icarus import adapter, arguments, atomic, base_model, model_folder
from icarus.errors import InputError
from icarus.train import data
from icarus.train.config import TRAIN
from icarus.train.run import check, last_checkpoint, report, run_directory, train

BASE, ENCODER = "base", "encoder"
"""Names in the output folder that no member can have: the prepared model, and the adapter that was merged into it."""

_OURS = {"base", "output", "method", "resume"}
"""Settings of ``icarus train`` that a team's runs are given."""

_KNOWN = {each.name for each in (*fields(TRAIN.own), *fields(TRAIN.of_trainer))} - _OURS

_RECIPE = "team-run.yaml"
"""In the folder of a run's checkpoints: the settings that these were made with."""

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- icarus
- shared-kv-cache
---

# A base model prepared for a team

`{base}`, fine-tuned on the data of its specialists together ({members}): ordinary LoRA, merged by `icarus train
--team`. It writes the KV cache that all of them read, so it is their base model, and `{base}` is not.

```
icarus serve PATH --adapters NAME=PATH_OR_HUB_ID ...
```

A specialist that joins later is trained on it: `icarus train --base PATH --data FILE --output ADAPTER`.
"""

Keys = dict[str, Any]


@dataclass(frozen=True)
class Team:
    """What the file says."""

    file: Path
    base: str
    output: Path
    prepare: Keys
    specialists: dict[str, Keys]
    common: Keys

    def keys(self, name: str) -> Keys:
        """What the file has for one run; evaluation is the members', unless ``prepare`` has its own."""
        if name != ENCODER:
            return self.common | self.specialists[name]
        common = {key: value for key, value in self.common.items() if not key.startswith(("eval_", "do_eval"))}
        return common | self.prepare | {"data": str(self.output / "encoder.jsonl"), "method": "lora"}

    def settings(self, name: str, base: str) -> tuple[Any, Any]:
        """Of one run, as ``icarus train --config`` would read them, and checked.

        Raises:
            InputError: a value is wrong, or does not go with another one.
        """
        target = self.output / name
        own = {"base": base, "output": str(target), "resume": last_checkpoint(target) is not None}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as recipe, _named(self.file, name):
            yaml.safe_dump(self.keys(name) | own, recipe)
            recipe.flush()
            settings = TRAIN.parse(["--config", recipe.name])
            check(*settings)
        return settings


@contextmanager
def _named(file: Path, name: str) -> Iterator[None]:
    """Errors say in which part of which file their cause is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}, {'prepare' if name == ENCODER else name}: {error}") from error


def read(file: Path) -> Team:
    """The team of a YAML file.

    Raises:
        InputError: the file cannot be read, or lacks something.
    """
    keys = arguments.read_yaml(file, "team file")
    base, output = (_taken(file, keys, name, str) for name in ("base", "output"))
    members = _taken(file, keys, "specialists", dict)
    prepare = _taken(file, keys, "prepare", dict) if keys.get("prepare") else keys.pop("prepare", None) or {}
    for name, own in members.items():
        if name in (BASE, ENCODER) or not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise InputError(f"{file}: a specialist cannot be called {name!r}; choose another plain word.")
        if not isinstance(own, dict) or "data" not in own:
            raise InputError(f"{file}: the specialist {name!r} has no data; give it data: FILE.jsonl.")
        _check_keys(file, f"the specialist {name!r}", own, _KNOWN)
    _check_keys(file, "the top", keys, _KNOWN - {"data"} | {"prepare", "specialists"})
    _check_keys(file, "prepare", prepare, _KNOWN - {"data"})
    return Team(file, base, Path(output).expanduser(), prepare, members, keys)


def _taken(file: Path, keys: Keys, name: str, kind: type) -> Any:
    value = keys.pop(name, None)
    if not isinstance(value, kind) or not value:
        raise InputError(f"{file}: {name} is missing or of the wrong kind; see docs/train.md for what it is.")
    return value


def _check_keys(file: Path, where: str, keys: Keys, known: set[str]) -> None:
    for key in keys:
        if key in _OURS or (key == "data" and key not in known):
            raise InputError(f"{file}: {where} has {key}, which follows from the team; leave it out.")
        if key not in known:
            like = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {like[0]}?" if like else "see icarus train --help for all of them."
            raise InputError(f"{file}: {where} has {key}, which is no setting; {hint}")


def run(file: Path) -> dict[str, Any]:
    """Prepare the base model, train what is missing, and return what was done as the report.

    Raises:
        InputError: something cannot be used; what was complete before stays.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--team trains in one process; start it without torchrun or accelerate.")
    team = read(file)
    base, rows = team.output / BASE, _rows(team)
    team.settings(ENCODER, team.base)
    done: dict[str, Any] = {"output": str(team.output), "base": str(base), "specialists": {}}
    if (base / "config.json").is_file():
        _check_kept(team, base)
    else:
        done["prepared"] = _prepare(team, rows)
    for name in team.specialists:
        target = team.output / name
        if (target / adapter.CONFIG_NAME).is_file():
            print(f"{target} is there and is kept; remove it to make it again.", file=sys.stderr)
        else:
            done["specialists"][name] = _train(team, name, str(base))
    adapters = " ".join(f"{name}={team.output / name}" for name in team.specialists)
    print(f"Serve the team with: icarus serve {base} --adapters {adapters}", file=sys.stderr)
    return done


def _rows(team: Team) -> dict[str, list[Keys]]:
    """Of each member, so that nothing is trained in vain where a file is wrong."""
    sources = {name: team.settings(name, team.base)[0].data for name in team.specialists}
    rows = {}
    for name, source in sources.items():
        with _named(team.file, name):
            rows[name] = data.read(source)
    return rows


def _train(team: Team, name: str, base: str) -> dict[str, Any] | None:
    """One run, which goes on from its checkpoints if these are of the same settings."""
    target, settings = team.output / name, team.settings(name, base)
    recipe, text = run_directory(target) / _RECIPE, yaml.safe_dump(team.keys(name))
    if last_checkpoint(target) and (not recipe.exists() or recipe.read_text(encoding="utf-8") != text):
        raise InputError(f"{recipe.parent} has checkpoints of a run with other settings; remove that folder.")
    print(f"Training {target} ...", file=sys.stderr)
    recipe.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(recipe, text)
    figures = report(train(*settings))
    for checkpoint in recipe.parent.glob("checkpoint-*"):  # or it would be resumed where the folder is removed
        shutil.rmtree(checkpoint)
    return figures


def _check_kept(team: Team, base: Path) -> None:
    """That a prepared base model is ours, and that the members that are there were trained on it."""
    if not (team.output / ENCODER / adapter.CONFIG_NAME).is_file():
        raise InputError(f"{base} is a model that no team prepared, as there is no encoder beside it; change output.")
    print(f"{base} is there and is kept; remove {team.output} to make all of it again.", file=sys.stderr)
    for name in team.specialists:
        if (team.output / name / adapter.CONFIG_NAME).is_file():
            adapter.verify(team.output / name, base)


def _prepare(team: Team, rows: Mapping[str, list[Keys]]) -> dict[str, Any] | None:
    """Ordinary LoRA on the data of all members, merged into the base model."""
    for target in (team.output / name for name in team.specialists):
        if (target / adapter.CONFIG_NAME).exists() or last_checkpoint(target):
            old = target if target.exists() else run_directory(target)
            raise InputError(f"{old} is of another base model, as {team.output / BASE} is missing; remove it.")
    encoder, file = team.output / ENCODER, team.output / "encoder.jsonl"
    _, sft = team.settings(ENCODER, team.base)
    figures = None
    if not (encoder / adapter.CONFIG_NAME).is_file():
        _check_forms(team, rows)
        count = sft.max_steps * sft.train_batch_size * sft.gradient_accumulation_steps
        mixed = islice(_mixed(rows.values()), count if sft.max_steps > 0 and not sft.packing else None)
        team.output.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mixed))
        figures = _train(team, ENCODER, team.base)
        file.unlink()
    _merge(team, encoder)
    return figures


def _merge(team: Team, encoder: Path) -> None:
    stored = model_folder.dtype_of(base_model.folder(team.base))
    model, codes = base_model.load(team.base, dtype=stored, device="cpu")
    merged: Any = adapter.merge(model, encoder)
    card = _CARD.format(base=team.base, members=", ".join(team.specialists))
    model_folder.save(merged, codes, team.output / BASE, card)
    print(f"{team.output / BASE} is the prepared base model: {team.base} with {encoder} merged.", file=sys.stderr)


def _check_forms(team: Team, rows: Mapping[str, list[Keys]]) -> None:
    first = next(iter(rows))
    for name, own in rows.items():
        if data.form(own[0]) != data.form(rows[first][0]):
            raise InputError(
                f"{team.file}: the rows of {first} and {name} have different forms, and the base model is prepared on "
                "both; bring them to one form."
            )


def _mixed(sources: Iterable[Sequence[Keys]]) -> Iterator[Keys]:
    """Rows of all sources in turns, until the last one ends."""
    for rows in zip_longest(*sources):
        yield from (row for row in rows if row is not None)
