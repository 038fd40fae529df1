"""A result of the accuracy experiment is kept as far as it got, and made again where it would be another one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from experiments.accuracy import data, settings, training, work
from experiments.accuracy.forms import Form
from experiments.accuracy.plan import Cell, Wanted
from icarus.evaluate import Outcome
from icarus.train import IcarusSFTTrainer
from icarus.train.run import run_directory
from saved import save_base

_TEXT = """
name: some
base: {base}
form: chat
dtype: float32
steps: 2
batch_size: 1
rates: [0.001]
seeds: [0]
test_items: 5
arms: {{icarus: {{method: icarus, rank: 2}}}}
grid: [{{tasks: [mawps], arms: [icarus]}}]
"""
_NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jo"]


def _save_data(folder: Path, thing: str) -> None:
    rows = [
        {"question": f"{name} has {n} {thing}s and gets {n}. Now?", "equation": f"X={n}.0+{n}.0", "answer": 2 * n}
        for name in _NAMES
        for n in (1, 2, 3)
    ]
    file = folder / "math_word_problems" / "mawps_train.jsonl.gz"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    work._parts.cache_clear()
    work._rows_digest.cache_clear()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> work.Place:
    monkeypatch.setattr(data, "VALIDATION_ROWS", 3)
    (tmp_path / "some.yaml").write_text(_TEXT.format(base=save_base(tmp_path / "base", max_position_embeddings=512)))
    _save_data(tmp_path, "cat")
    for name in ("work", "results"):
        (tmp_path / name).mkdir()
    read = settings.read(tmp_path / "some.yaml")
    return work.Place(read, tmp_path, tmp_path / "work", tmp_path / "results")


def test_scoring_goes_on_where_it_was_interrupted(place: work.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, asked = work.evaluate, list[str]()

    def interrupted(*args: Any, **options: Any) -> Iterator[Outcome]:
        for outcome in evaluate(*args, **options | {"batch_size": 1}):
            asked.append(outcome.item)
            yield outcome
            if len(asked) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(work, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.perform_base(place, "mawps")
    assert not work.base_done(place, "mawps")
    work.perform_base(place, "mawps")
    found = work.scores(place, work.base_cell("mawps"))
    assert found is not None
    assert found["items"]["item"].split() == sorted(asked) == [f"mawps-{index}" for index in range(5)]
    assert not any(place.work.iterdir())


def test_other_rows_items_or_dtype_make_a_result_void(place: work.Place) -> None:
    work.perform_base(place, "mawps")
    assert work.base_done(place, "mawps")
    for changes in ({"dtype": "bfloat16"}, {"test_items": 4}, {"scored_items": {"mawps": 3}}):
        assert not work.base_done(replace(place, settings=replace(place.settings, **changes)), "mawps")
    _save_data(place.data, "dog")
    assert not work.base_done(place, "mawps")


def test_short_problems_are_cut_by_their_words(place: work.Place) -> None:
    made = work.parts(place, "mawps")
    people = [{row["prompt"][0]["content"].split()[0] for row in rows} for rows in (made.train, made.validation)]
    assert not people[0] & people[1]
    assert made.train[0]["completion"][0]["content"] in {f"{n}+{n}\n#### {2 * n}" for n in (1, 2, 3)}


@pytest.mark.parametrize("form", [None, "residual"])
@pytest.mark.parametrize("at", ["its fifth step", "its validation loss"])
def test_training_goes_on_where_it_was_interrupted(
    place: work.Place, monkeypatch: pytest.MonkeyPatch, form: Form | None, at: str
) -> None:
    """Checkpoints are written after two steps each."""
    arms = {"icarus": replace(place.settings.arms["icarus"], form=form)}
    place = replace(place, settings=replace(place.settings, steps=6, arms=arms, scores=False))
    other = replace(place, work=place.work / "other", results=place.results / "other")
    other.results.mkdir()
    wanted = Wanted(Cell("mawps", "icarus", 0.001, 0), scored=False)
    steps = list[int]()
    with monkeypatch.context() as patch:
        _interrupt(patch, at, steps)
        with pytest.raises(KeyboardInterrupt):
            work.perform(place, wanted)
    taken = len(steps)
    _count(monkeypatch, steps)
    work.perform(place, wanted)
    assert len(steps) - taken == (2 if at == "its fifth step" else 0)
    work.perform(other, wanted)
    assert place.loss(wanted.cell) == other.loss(wanted.cell)
    assert not run_directory(place.adapter(wanted.cell)).exists()


def _count(patch: pytest.MonkeyPatch, steps: list[int], last: int | None = None) -> None:
    step = IcarusSFTTrainer.training_step

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        if len(steps) == last:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return step(self, *args, **options)

    patch.setattr(IcarusSFTTrainer, "training_step", counted)


def _interrupt(patch: pytest.MonkeyPatch, at: str, steps: list[int]) -> None:
    _count(patch, steps, last=4 if at == "its fifth step" else None)
    if at == "its validation loss":
        for module, name in ((work, "_validation_loss"), (training, "form_loss")):
            patch.setattr(module, name, Mock(side_effect=KeyboardInterrupt))
