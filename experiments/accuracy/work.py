"""One run: training by ``icarus train``'s own code, its curve, its loss on validation rows, its scores.

A result is one JSON file. It carries what it depends on (``identity``), so one of other rows or settings is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from experiments.accuracy import bases, data, training
from experiments.accuracy.plan import Cell, Wanted, best_rate
from experiments.accuracy.settings import Arm, Settings
from icarus import adapter as adapters
from icarus import arguments, atomic, base_model
from icarus.bench import measure
from icarus.chat_template import Codec
from icarus.context import BASE
from icarus.errors import InputError
from icarus.evaluate import Sides, TokenRow, evaluate
from icarus.evaluate.records import Records
from icarus.evaluate.run import digest
from icarus.train.data import tokenize
from icarus.train.run import run_directory

_BATCH = 8
_SCORED = {"cpu": 16, "cuda": 64}
"""Items whose answers are generated in one pass; fewer of those tasks whose rows are longer."""
_ROWS_PER_STEP = 4  # rows written for each row that an arm of the common number of steps sees; equal time needs more


@dataclass(frozen=True, eq=False)
class Place:
    """Where things are."""

    settings: Settings
    data: Path
    work: Path
    """Checkpoints, adapters, the team's base model."""
    results: Path

    def result(self, cell: Cell) -> Path:
        """The file of a run's training."""
        return self.results / f"{cell.name}.json"

    def scores(self, cell: Cell) -> Path:
        """The file of its answers' scores."""
        return self.results / f"{cell.name}.scores.json"

    def adapter(self, cell: Cell) -> Path:
        """Where its adapter lies; one of other rows or settings lies elsewhere, as do its checkpoints."""
        depends = json.dumps([identity(self, cell), _steps(self, cell)])
        return self.work / f"{cell.name}.{_key(depends)}" / "adapter"

    def loss(self, cell: Cell) -> float | None:
        """The loss on the validation rows; None where the run has not finished, or was another one."""
        result = read(self.result(cell))
        same = result and result["identity"] == identity(self, cell) and result["steps"] == _steps(self, cell)
        return result["validation_loss"] if result and same else None

    def done(self, wanted: Wanted) -> bool:
        """Whether nothing is left to do."""
        if self.loss(wanted.cell) is None:
            return False
        return not wanted.scored or scores(self, wanted.cell) is not None


def read(file: Path) -> dict[str, Any] | None:
    """A result; None where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def parts(place: Place, task: str) -> data.Parts:
    """A task in this model's form."""
    return _parts(task, *_form(place))


def _form(place: Place) -> tuple[Path, data.Form, int, int]:
    """What a task's rows depend on; a process that makes several runs reads them once."""
    settings = place.settings
    return place.data, settings.form, settings.test_items, _ROWS_PER_STEP * settings.steps * settings.batch_size


@cache
def _parts(task: str, folder: Path, form: data.Form, test_items: int, most: int) -> data.Parts:
    made = data.parts(task, folder, form, test_items)
    return replace(made, train=made.train[:most])


@cache
def _rows_digest(base: str, task: str, form: tuple[Path, data.Form, int, int]) -> str:
    """Of the token ids and labels of all rows and items."""
    codec, own = _codec(base), _parts(task, *form)
    whole = hashlib.sha256(digest(own.test, codec).encode())
    for row in (*own.train, *own.validation):
        columns = tokenize(row, codec, None)
        whole.update(repr((list(columns["input_ids"]), list(columns["labels"]))).encode())
    return whole.hexdigest()[:16]


@cache
def _codec(base: str) -> Codec:
    return Codec(AutoTokenizer.from_pretrained(base_model.folder(base)))


@cache
def _fingerprint(base: str) -> str:
    return adapters.fingerprint(base_model.folder(base))


def identity(place: Place, cell: Cell) -> dict[str, Any]:
    """What a result depends on, besides code and machine."""
    settings, arm = place.settings, place.settings.arms.get(cell.arm)
    depends: dict[str, Any] = {
        "base": _fingerprint(settings.base),
        "rows": _rows_digest(settings.base, cell.task, _form(place)),
        "dtype": settings.dtype,
    }
    if arm is None:
        return depends
    depends |= {"arm": _given(arm)}
    depends |= {"steps": settings.steps, "batch_size": settings.rows_per_step(cell.task)}
    depends |= {"rate": cell.rate, "seed": cell.seed}
    if rows := settings.validation_rows.get(cell.task):
        depends["validation_rows"] = rows
    if arm.base != "base":
        depends["team"] = _team_identity(place)
    if arm.teacher:
        rate = best_rate(settings, cell.task, arm.teacher, place.loss)
        depends["teacher"] = rate and identity(place, Cell(cell.task, arm.teacher, rate, cell.seed))
    return depends


def scores(place: Place, cell: Cell) -> dict[str, Any] | None:
    """The scores of a run's answers; None where there are none, or those of another run or of other items."""
    found = read(place.scores(cell))
    return found if found and found["identity"] == _scored_identity(place, cell) else None


def _scored_identity(place: Place, cell: Cell) -> dict[str, Any]:
    items = place.settings.scored_items.get(cell.task)
    return identity(place, cell) | ({"items": items} if items else {})


def _team_identity(place: Place) -> dict[str, Any]:
    """What a prepared base model depends on."""
    team = asdict(place.settings.team)
    team["rows"] = [_rows_digest(place.settings.base, task, _form(place)) for task in place.settings.team.tasks]
    identity: dict[str, Any] = json.loads(json.dumps(team))
    return identity


def perform(place: Place, wanted: Wanted) -> None:
    """Train, unless it is done; score, if that is wanted."""
    cell = wanted.cell
    if place.loss(cell) is None or (wanted.scored and not place.adapter(cell).exists()):
        _train(place, cell)
    if wanted.scored and not place.done(wanted):
        _score(place, cell.task, cell, {cell.arm: place.adapter(cell)}, _base(place, place.settings.arms[cell.arm]))


def perform_base(place: Place, task: str) -> None:
    """The scores of the base model itself."""
    _score(place, task, base_cell(task), {}, place.settings.base)


def base_cell(task: str) -> Cell:
    """The name under which the base model's scores lie."""
    return Cell(task, BASE, 0.0, 0)


def base_done(place: Place, task: str) -> bool:
    """Whether they are there."""
    return scores(place, base_cell(task)) is not None


def _train(place: Place, cell: Cell) -> None:
    """Another process that was at it has finished when this one's turn comes."""
    folder = place.adapter(cell).parent
    with _alone(folder.with_name(f"{folder.name}.lock")):
        if place.loss(cell) is None or not place.adapter(cell).exists():
            _train_alone(place, cell)


def _train_alone(place: Place, cell: Cell) -> None:
    settings, arm = place.settings, place.settings.arms[cell.arm]
    base, output = _base(place, arm), place.adapter(cell)
    shutil.rmtree(output, ignore_errors=True)
    own = parts(place, cell.task)
    told = training.Training(
        arm=arm,
        base=base,
        output=output,
        rows=_write(place, f"{cell.task}.train", own.train),
        validation=_write(place, f"{cell.task}.validation", own.validation) if settings.curves(cell.task) else None,
        steps=_steps(place, cell),
        batch_size=settings.rows_per_step(cell.task),
        rate=cell.rate,
        seed=cell.seed,
        teacher=_teacher(place, cell) if arm.teacher else None,
    )
    trained = training.run(settings, told)
    form = trained.form
    loss = training.form_loss(form, _validation(place, cell.task)) if form else _validation_loss(place, cell, base)
    result = {
        "identity": identity(place, cell),
        "task": cell.task,
        "arm": cell.arm,
        "trained_on": _fingerprint(base),  # a base model that is prepared again is another one
        "steps": told.steps,
        "validation_loss": loss,
        "trainable": trained.trainable,
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "cpu_seconds": trained.cpu_seconds,
        "peak_bytes": trained.peak_bytes,
        "train": trained.curve("loss"),
        "validation": trained.curve("eval_loss"),
        "machine": measure.settings(),
    }
    if trained.resumed:
        result["resumed"] = True
    arguments.write_json(result, str(place.result(cell)))
    shutil.rmtree(run_directory(output))


def _teacher(place: Place, cell: Cell) -> Path:
    """The adapter that an arm distils: of the same seed, at its arm's best rate; made again where it was not kept."""
    name = str(place.settings.arms[cell.arm].teacher)
    rate = best_rate(place.settings, cell.task, name, place.loss)
    assert rate is not None, "the plan waits for it"
    teacher = Cell(cell.task, name, rate, cell.seed)
    if not place.adapter(teacher).exists():
        _train(place, teacher)
    return place.adapter(teacher)


def _write(place: Place, name: str, rows: Sequence[data.Row]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file = place.work / f"{name}.{_key(text)}.jsonl"  # other rows are another file: a run may be reading this one
    atomic.write_text(file, text)
    return file


def _key(depends: str) -> str:
    return hashlib.sha256(depends.encode()).hexdigest()[:12]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Of several runs that need the same thing, one makes it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _base(place: Place, arm: Arm) -> str:
    return str(base_model.folder(place.settings.base) if arm.base == "base" else _team_base(place, arm.base))


def _team_base(place: Place, kind: str) -> Path:
    """The base model that was prepared for the team: made once, and again for other rows or settings."""
    settings, team = place.settings, place.settings.team
    depends = json.dumps([_fingerprint(settings.base), _team_identity(place)])
    folder = place.work / f"{kind}-{_key(depends)}"
    with _alone(folder.with_suffix(".lock")):
        if not folder.exists():
            share = -(-team.steps * settings.batch_size // len(team.tasks))
            rows = {task: parts(place, task).train[:share] for task in team.tasks}
            if kind == "together":
                bases.together(settings, rows, folder)
            else:
                file = _write(place, "team", [row for own in rows.values() for row in own])
                bases.merged(settings, file, folder.with_name(f"{folder.name}-adapter"), folder)
    return folder


def _steps(place: Place, cell: Cell) -> int:
    """Of all arms the same, but of those that train as long as another one."""
    settings, arm = place.settings, place.settings.arms[cell.arm]
    if arm.time_of is None:
        return settings.steps
    own, other = step_ms(place, cell.task, arm), step_ms(place, cell.task, settings.arms[arm.time_of])
    if own is None or other is None:
        raise InputError(f"{place.results / 'times.json'} lacks {cell.task}; measure step times first (times).")
    return round(settings.steps * other / own)


def step_ms(place: Place, task: str, arm: Arm) -> float | None:
    """Milliseconds of an arm's step; None where none like it was measured."""
    measured = (read(place.results / "times.json") or {"tasks": {}})["tasks"].get(task, {})
    wanted = _timed(arm)
    alike = (name for name in measured if (own := place.settings.arms.get(name)) and _timed(own) == wanted)
    return next((float(measured[name]["median_ms"]) for name in alike), None)


def timed_identity(place: Place, task: str, arms: Sequence[str]) -> dict[str, Any]:
    """What the step times of arms on a task depend on, besides code and machine."""
    own = {name: _given(_timed(place.settings.arms[name])) for name in arms}
    return identity(place, base_cell(task)) | {"batch_size": place.settings.rows_per_step(task), "arms": own}


def _given(arm: Arm) -> dict[str, Any]:
    """So that a setting that is new makes no result void that does without."""
    return {key: value for key, value in asdict(arm).items() if value is not None}


def _timed(arm: Arm) -> Arm:
    """What makes no step slower is left out."""
    return replace(arm, base="base", rate=None, rates_of=None, time_of=None)


def _validation(place: Place, task: str) -> list[data.Row]:
    """The rows that rates are chosen by."""
    return parts(place, task).validation[: place.settings.validation_rows.get(task)]


def _validation_loss(place: Place, cell: Cell, base: str) -> float:
    """Mean over all tokens that carry loss, in nats."""
    sides = Sides.load(base, {cell.arm: place.adapter(cell)}, dtype=place.settings.dtype)
    columns = [tokenize(row, sides.codec, None) for row in _validation(place, cell.task)]
    rows = [TokenRow(column["input_ids"], column["labels"]) for column in columns]
    rows.sort(key=lambda row: len(row.input_ids))
    with sides.side(cell.arm) as side:
        scored = [one for start in range(0, len(rows), _BATCH) for one in side.score(rows[start : start + _BATCH])]
    values = [value for one in scored for value in one.log_probabilities]
    return -sum(values) / len(values)


def _score(place: Place, task: str, cell: Cell, sources: dict[str, Path], base: str) -> None:
    """Of each item: score, loss per token of the reference, its tokens, drift."""
    settings = place.settings
    sides = Sides.load(base, sources, dtype=settings.dtype)
    batch = max(_SCORED[training.device()] * settings.rows_per_step(task) // settings.batch_size, 1)
    test = parts(place, task).test
    asked = replace(test, items=test.items[: settings.scored_items.get(task)])
    scored = _scored_identity(place, cell)
    records = _records(place, cell, scored | sides.identities)
    names = [next(iter(sources), BASE)]
    for outcome in evaluate(sides, asked, names, batch_size=batch, done=records.done(asked.name)):
        records.add(outcome)
    outcomes = sorted(records.outcomes, key=lambda outcome: outcome.item)
    result = {
        "identity": scored,
        "task": task,
        "arm": cell.arm,
        "scorer": test.scorer,
        "items": {  # texts, which keep a file of 300 items short
            "item": " ".join(o.item for o in outcomes),
            "score": " ".join(f"{o.score:.4g}" for o in outcomes),
            "loss": " ".join(f"{o.loss:.5f}" for o in outcomes),
            "tokens": " ".join(str(o.tokens) for o in outcomes),
            "generated": " ".join(str(o.generated_tokens) for o in outcomes),
            "drift": " ".join("-" if o.drift is None else f"{o.drift:.5f}" for o in outcomes),
        },
        "machine": measure.settings(),
    }
    arguments.write_json(result, str(place.scores(cell)))
    records.finish()


def _records(place: Place, cell: Cell, depends: dict[str, Any]) -> Records:
    """The items that were scored before an interruption; those of another adapter or of others have another file."""
    name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
    return Records(place.work / f"{cell.name}.scores.{name}", depends)
