"""What the accuracy experiment runs next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.accuracy import data, settings, work
from experiments.accuracy.plan import Cell, best_rate, wanted
from icarus.errors import InputError

_TEXT = """
name: some
base: smollm2-135m-instruct
form: chat
dtype: bfloat16
steps: 10
batch_size: 2
rates: [0.001, 0.002, 0.004]
seeds: [0, 1]
test_items: 4
arms: {icarus: {method: icarus, rank: 2}}
grid: [{tasks: [wikisql], arms: [icarus]}]
"""


def _read(folder: Path, text: str) -> settings.Settings:
    (folder / "some.yaml").write_text(text)
    return settings.read(folder / "some.yaml")


def test_a_search_grows_while_its_best_rate_is_at_an_edge(tmp_path: Path) -> None:
    losses = {0.001: 3.0, 0.002: 2.0, 0.004: 1.0}
    read = _read(tmp_path, _TEXT)

    def loss(cell: Cell) -> float | None:
        return losses.get(cell.rate)

    assert best_rate(read, "wikisql", "icarus", loss) is None
    assert {one.cell.rate for one in wanted(read, loss) if loss(one.cell) is None} == {0.008}
    losses[0.008] = 2.0
    assert best_rate(read, "wikisql", "icarus", loss) == 0.004
    assert {(one.cell.rate, one.cell.seed, one.scored) for one in wanted(read, loss)} == {
        (0.004, 0, True),
        (0.004, 1, True),
    }


def test_a_rate_that_is_known_is_not_searched(tmp_path: Path) -> None:
    read = _read(tmp_path, _TEXT.replace("rank: 2}", "rank: 2, rate: 0.003}"))
    assert {(one.cell.rate, one.scored) for one in wanted(read, lambda cell: None)} == {(0.003, True)}


def test_a_rate_makes_no_step_slower(tmp_path: Path) -> None:
    """Nor is an arm looked for that the settings lack."""
    arms = "{plain: {method: icarus, rank: 2, rate: 0.1}, longer: {method: icarus, rank: 2, rate: 0.2, base: team}}"
    text = _TEXT.replace("{icarus: {method: icarus, rank: 2}}", arms).replace("arms: [icarus]", "arms: [plain]")
    read = _read(tmp_path, text + "team: {tasks: [wikisql], steps: 1, rate: 0.1}\n")
    place = work.Place(read, tmp_path, tmp_path, tmp_path)
    measured = {"gone": {"median_ms": 1.0}, "plain": {"median_ms": 2.0}}
    (tmp_path / "times.json").write_text(json.dumps({"tasks": {"wikisql": measured}}))
    assert work.step_ms(place, "wikisql", read.arms["longer"]) == 2.0


def test_nothing_is_scored_where_losses_are_enough(tmp_path: Path) -> None:
    read = _read(tmp_path, _TEXT + "scores: false\n")
    losses = {0.001: 2.0, 0.002: 1.0, 0.004: 2.0}
    assert not any(one.scored for one in wanted(read, lambda cell: losses[cell.rate]))


def test_a_search_needs_rates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the arm icarus has no rate and there are no rates to search; give either"):
        _read(tmp_path, _TEXT.replace("[0.001, 0.002, 0.004]", "[]"))


def test_an_arm_on_a_prepared_base_needs_to_be_told_how_that_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="arm icarus needs a prepared base model; say under team"):
        _read(tmp_path, _TEXT.replace("rank: 2}", "rank: 2, base: team}"))


def test_a_run_of_equal_time_is_made_again_when_other_step_times_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = "arms: {lora: {method: lora, rank: 2}, icarus: {method: icarus, rank: 2}, time: {method: icarus, rank: 2, "
    arms += "rates_of: icarus, time_of: lora}}"
    read = _read(tmp_path, _TEXT.replace("arms: {icarus: {method: icarus, rank: 2}}", arms))
    monkeypatch.setattr(work, "identity", lambda *_: {})
    place, cell = work.Place(read, tmp_path, tmp_path, tmp_path), Cell("wikisql", "time", 0.002, 0)
    place.result(cell).write_text(json.dumps({"identity": {}, "steps": 20, "validation_loss": 1.0}))
    for icarus_ms, loss in ((5, 1.0), (4, None)):
        times = {"lora": {"median_ms": 10}, "icarus": {"median_ms": icarus_ms}}
        (tmp_path / "times.json").write_text(json.dumps({"tasks": {"wikisql": times}}))
        assert place.loss(cell) == loss


@pytest.mark.parametrize(
    ("was", "wrong", "message"),
    [
        ("tasks: [wikisql]", "tasks: [wikisq]", "the grid has wikisq with icarus, one of which does not exist"),
        ("arms: [icarus]", "arms: [lora]", "the grid has wikisql with lora, one of which does not exist"),
        ("test_items: 4", "test_items: 4\nbatch_sizes: {wikisq: 2}", "batch_sizes has wikisq, which is no task"),
        ("test_items: 4", "test_itens: 4", "is no file of settings"),
        ("name: some", "name: [", "is no file of settings"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, was: str, wrong: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _read(tmp_path, _TEXT.replace(was, wrong))


def test_missing_settings_or_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.yaml cannot be read"):
        settings.read(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match=r"wikisql_train.jsonl.gz is missing"):
        data.parts("wikisql", tmp_path, "chat", 4)
