"""``icarus train --team``: one prepared base model, a specialist for each member, and what is kept or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from icarus import adapter, base_model, cli
from icarus.errors import InputError
from icarus.streams import EncoderCache, TwoStreams
from icarus.train import team
from saved import save_base, save_rows

ROWS = {
    "planner": [{"prompt": p, "completion": c} for p, c in (("one:", "uno"), ("two, please:", "dos"))],
    "sql": [{"prompt": p, "completion": c} for p, c in (("a:", "select a"), ("b and c:", "select b, c"))],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def write(folder: Path, model: Path, **changes: Any) -> Path:
    """A team's file and its data."""
    members = {name: {"data": str(save_rows(folder / f"{name}.jsonl", *rows))} for name, rows in ROWS.items()}
    keys: dict[str, Any] = {
        "base": str(model),
        "output": str(folder / "team"),
        "prepare": {"max_steps": 3, "learning_rate": 0.05},
        "specialists": members,
        "max_steps": 2,
        "rank": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
    }
    file = folder / "team.yaml"
    file.write_text(yaml.safe_dump({**keys, **changes}), encoding="utf-8")
    return file


def keys_of(folder: Path) -> torch.Tensor:
    """K of the last layer, which a base model writes for a few tokens."""
    streams, cache = TwoStreams(base_model.load(str(folder))[0]), EncoderCache()
    streams.encode(torch.arange(5, 15)[None], cache)
    return cache.layer(cache.layers - 1)[0]


def test_a_team_gets_a_base_model_and_its_specialists(base: Path, tmp_path: Path) -> None:
    assert cli.main(["train", "--team", str(write(tmp_path, base)), "--json", str(tmp_path / "report.json")]) == 0
    output = tmp_path / "team"
    assert sorted(path.name for path in output.iterdir() if path.suffix != ".run") == ["base", "encoder", *ROWS]
    for name in ROWS:
        adapter.verify(output / name, output / "base")
        with pytest.raises(InputError, match="base"):
            adapter.verify(output / name, base)  # it was trained on other K and V
    assert not torch.equal(keys_of(output / "base"), keys_of(base))
    card = (output / "base" / "README.md").read_text()
    assert f"`{base}`, fine-tuned on the data of its specialists together ({', '.join(ROWS)})" in card


def test_the_prepared_base_model_is_the_merged_one(base: Path, tmp_path: Path) -> None:
    team.run(write(tmp_path, base))
    model, _ = base_model.load(str(base), dtype="float32")
    merged = adapter.merge(model, tmp_path / "team" / "encoder").state_dict()
    stored, _ = base_model.load(str(tmp_path / "team" / "base"), dtype="float32")
    for name, tensor in stored.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=0)


def test_what_is_there_is_kept_and_the_rest_is_made_anew(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write(tmp_path, base, report_to="tensorboard"), tmp_path / "team"
    team.run(file)
    assert list((output / "sql.run").rglob("*tfevents*"))  # logs stay
    before = adapter.fingerprint(output / "base"), (output / "sql" / adapter.WEIGHTS_NAME).read_bytes()
    shutil.rmtree(output / "sql")
    report = team.run(write(tmp_path, base, learning_rate=0.3))
    assert list(report["specialists"]) == ["sql"]
    after = adapter.fingerprint(output / "base"), (output / "sql" / adapter.WEIGHTS_NAME).read_bytes()
    assert (after[0], after[1] == before[1]) == (before[0], False)
    assert f"{output / 'planner'} is there and is kept" in capsys.readouterr().err


def test_members_of_another_base_model_are_refused(base: Path, tmp_path: Path) -> None:
    file, output = write(tmp_path, base), tmp_path / "team"
    team.run(file)
    prepared = output / "base"
    kept = prepared.rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"planner.*of another base model"):
        team.run(file)
    shutil.copytree(base, prepared)
    with pytest.raises(InputError, match="planner"):
        team.run(file)
    shutil.rmtree(prepared)
    kept.rename(prepared)
    assert team.run(file)["specialists"] == {}


def test_an_encoder_of_another_base_model_is_not_merged(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "team"
    team.run(write(tmp_path, base))
    for part in ("base", *ROWS):
        shutil.rmtree(output / part)
    with pytest.raises(InputError, match="encoder was trained on"):
        team.run(write(tmp_path, save_base(tmp_path / "other")))


def test_a_model_of_the_user_is_not_taken_for_a_prepared_one(base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "team" / "base")
    with pytest.raises(InputError, match="no team prepared"):
        team.run(write(tmp_path, own))
    assert not (tmp_path / "team" / "sql").exists()


def test_a_preparation_that_diverged_is_not_merged(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = team.train

    def diverge(*settings: Any) -> dict[str, Any]:
        figures = trained(*settings)
        file = tmp_path / "team" / "encoder" / adapter.WEIGHTS_NAME
        save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
        return figures

    monkeypatch.setattr(team, "train", diverge)
    with pytest.raises(InputError, match="not finite"):
        team.run(write(tmp_path, base))
    assert not (tmp_path / "team" / "base").exists()


def test_a_base_model_whose_sampling_is_warned_of_can_be_prepared(base: Path, tmp_path: Path) -> None:
    old = shutil.copytree(base, tmp_path / "old")
    (old / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    team.run(write(tmp_path, old))
    file = tmp_path / "team" / "base" / "model.safetensors"
    assert file.stat().st_mode == (file.parent / "config.json").stat().st_mode


def test_what_was_interrupted_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, output = write(tmp_path, base, save_steps=1), tmp_path / "team"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("icarus.train.run._write", stop)  # after the last checkpoint of the preparation
        with pytest.raises(KeyboardInterrupt):
            team.run(file)
    assert not (output / "encoder").exists()
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            team.run(file)
    assert (output / "encoder").exists()
    assert not (output / "base").exists()
    report = team.run(file)
    assert report["prepared"] is None  # it was trained before
    assert set(report["specialists"]) == set(ROWS)


def test_checkpoints_of_other_settings_are_not_resumed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("icarus.train.run._write", stop)
        with pytest.raises(KeyboardInterrupt):
            team.run(write(tmp_path, base, save_steps=1))
    with pytest.raises(InputError, match="checkpoints of a run with other settings"):
        team.run(write(tmp_path, base, save_steps=1, rank=3))


def test_members_take_turns_until_the_steps_are_filled() -> None:
    mixed = team._mixed([[{"a": 1}, {"a": 2}, {"a": 3}], [{"b": 1}]])
    assert list(mixed) == [{"a": 1}, {"b": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": None}, "base is missing"),
        ({"specialists": {}}, "specialists is missing"),
        ({"specialists": {"base": {"data": "x.jsonl"}}}, "cannot be called 'base'"),
        ({"specialists": {"a/b": {"data": "x.jsonl"}}}, "cannot be called 'a/b'"),
        ({"specialists": {"sql": {"rank": 2}}}, "'sql' has no data"),
        ({"specialists": {"sql": {"data": "x.jsonl", "rnak": 2}}}, "'sql' has rnak, .* did you mean rank"),
        ({"specialists": {"sql": {"data": "x.jsonl"}}}, "team.yaml, sql: .*x.jsonl"),
        ({"prepar": {}}, "the top has prepar, .* did you mean prepare"),
        ({"specialists": {False: {"data": "x.jsonl"}}}, "cannot be called False"),
        ({"specialists": {"sql": {"data": "x.jsonl", "output": "y"}}}, "'sql' has output"),
        ({"prepare": 3}, "prepare is missing or of the wrong kind"),
        ({"prepare": {"method": "icarus"}}, "prepare has method"),
        ({"method": "lora"}, "the top has method"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"learning_rat": 1}, "learning_rat"),
    ],
)
def test_a_file_that_is_wrong_is_refused(base: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        team.run(write(tmp_path, base, **changes))
    assert not (tmp_path / "team").exists()


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "team.yaml"
    file.write_bytes(b"base: \xff")
    with pytest.raises(InputError, match="is not YAML"):
        team.run(file)


CHAT = {
    "prompt": [{"role": "user", "content": "a"}],
    "completion": [{"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize("row", [{"text": "abc"}, CHAT])
def test_data_of_several_forms_is_refused(base: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    other = save_rows(tmp_path / "other.jsonl", row)
    members = {"sql": {"data": str(save_rows(tmp_path / "a.jsonl", *ROWS["sql"]))}, "other": {"data": str(other)}}
    with pytest.raises(InputError, match="different forms"):
        team.run(write(tmp_path, base, specialists=members))


def test_other_flags_beside_it_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--team", str(write(tmp_path, base)), "--rank", "4"]) == 2
    assert "--team FILE stands alone" in capsys.readouterr().err
    assert cli.main(["train", "--team"]) == 2
    assert "--team needs the name of a team's YAML file" in capsys.readouterr().err


def test_several_processes_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        team.run(write(tmp_path, base))
