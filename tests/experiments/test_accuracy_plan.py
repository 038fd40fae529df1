"""What the accuracy experiment runs next."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.accuracy import data, driver, settings, times, work
from experiments.accuracy.plan import Cell, Wanted, best_rate, wanted
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
        ("method: icarus", "method: icaru", "the arm icarus has method 'icaru'; give one of icarus, lora, distill"),
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


def test_step_times_are_kept_task_by_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They decide the steps of runs of equal time."""
    place = work.Place(_read(tmp_path, _TEXT), tmp_path, tmp_path, tmp_path)
    rows, measured = {"wikisql": "a", "gsm8k": "b"}, list[str]()

    def measure(_: Any, task: str, arms: list[str], repeats: int) -> dict[str, Any]:
        measured.append(task)
        if measured == ["wikisql", "gsm8k"]:
            raise KeyboardInterrupt
        return {arm: {"median_ms": 1.0} for arm in arms}

    monkeypatch.setattr(times, "_measured", measure)
    monkeypatch.setattr(work, "identity", lambda place, cell: {"rows": rows[cell.task]})
    with pytest.raises(KeyboardInterrupt):
        times.run(place, ["wikisql", "gsm8k"], ["icarus"], 1)
    times.run(place, ["wikisql", "gsm8k"], ["icarus"], 1)
    assert measured == ["wikisql", "gsm8k", "gsm8k"]
    rows["gsm8k"] = "c"
    times.run(place, ["wikisql", "gsm8k"], ["icarus"], 1)
    wider = replace(place.settings, arms={"icarus": replace(place.settings.arms["icarus"], rank=64)})
    times.run(replace(place, settings=wider), ["wikisql"], ["icarus"], 1)
    assert measured[3:] == ["gsm8k", "wikisql"]
    (tmp_path / "times.json").write_text(
        '{"tasks": {}, "machines": {}}'
    )  # as one removes a task, and before there was more
    times.run(place, ["gsm8k"], ["icarus"], 1)
    assert measured[5:] == ["gsm8k"]


def test_a_student_of_another_teacher_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = "arms: {lora: {method: lora, rank: 2}, taught: {method: distill, rank: 2, teacher: lora}}"
    text = _TEXT.replace("arms: {icarus: {method: icarus, rank: 2}}", arms).replace("[icarus]", "[lora]")
    monkeypatch.setattr(work, "_fingerprint", lambda base: base)
    monkeypatch.setattr(work, "_rows_digest", lambda base, task, form: task)
    identities = []
    for best, rank in ((0.002, 2), (0.002, 2), (0.004, 2), (0.002, 3)):
        read = _read(tmp_path, text.replace("method: lora, rank: 2", f"method: lora, rank: {rank}"))
        monkeypatch.setattr(work, "best_rate", lambda *_, best=best: best)
        place = work.Place(read, tmp_path, tmp_path, tmp_path)
        identities.append(work.identity(place, Cell("wikisql", "taught", 0.001, 0)))
    assert identities[0] == identities[1]
    assert identities[0] not in identities[2:]


def _killed(place: work.Place, job: Any) -> None:
    """In the driver's processes: the run of the first rate is killed, when the others have begun."""
    begun = place.work / f"begun {job.cell.rate}"
    begun.write_text("")
    while job.cell.rate == 0.001 and not (place.work / "begun 0.002").exists():
        time.sleep(0.01)
    if job.cell.rate == 0.001:
        os.kill(os.getpid(), signal.SIGKILL)
    while job.cell.rate == 0.002 and not (place.work / "alone").exists():
        (place.work / "alone").write_text("")
        time.sleep(20)  # it is killed with the first one
    place.result(job.cell).write_text("{}")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_is_killed_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: int
) -> None:
    """As for its memory. Those beside it, which die with it, are run once more."""
    place = work.Place(_read(tmp_path, _TEXT), tmp_path, tmp_path, tmp_path)
    for name in ("begun 0.002", "alone") if jobs == 1 else ():
        (tmp_path / name).write_text("")
    cells = [Cell("wikisql", "icarus", rate, 0) for rate in (0.001, 0.002, 0.004)]
    wanted_ = [Wanted(cell, scored=False) for cell in cells]
    monkeypatch.setattr(driver, "_perform", _killed)
    monkeypatch.setattr(driver, "_jobs", lambda _: [one for one in wanted_ if not place.result(one.cell).exists()])
    assert driver.run(place, jobs) == 1
    assert [place.result(cell).exists() for cell in cells] == [False, True, True]
    assert "killed wikisql.icarus.0.001.0" in capsys.readouterr().out
