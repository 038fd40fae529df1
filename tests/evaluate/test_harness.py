"""lm-evaluation-harness: the model ``icarus`` gives the numbers of lm-eval's own ``hf`` where that can run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from harness_tasks import save_tasks, scores
from icarus import Specialists, adapter
from icarus.errors import InputError
from icarus.evaluate import harness
from icarus.evaluate.harness import IcarusLM
from saved import save_adapter, save_base
from tiny_models import tiny

PAIRS = [
    ("Who wrote", " it?"),
    ("2 + 2 = ", "4"),
    ("2 + 2 = ", "5"),
    ("a much longer context than others", "!"),
    ("", "b"),
]
ASKED = ["abc", "Who wrote the cache?", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    save_base(folder / "base")
    save_adapter(folder / "ours")
    model = adapter.attach_conventional(tiny(), rank=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    adapter.save_conventional(model, folder / "theirs")
    save_tasks(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def ours(folder: Path, **options: Any) -> IcarusLM:
    return IcarusLM(str(folder / "base"), dtype="float32", device="cpu", batch_size=2, **options)


def theirs(folder: Path, **options: Any) -> HFLM:
    return HFLM(str(folder / "base"), dtype="float32", device="cpu", batch_size=2, **options)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


@pytest.mark.parametrize("peft", [None, "theirs"])
def test_numbers_are_those_of_lm_evals_own_class(folder: Path, peft: str | None) -> None:
    source = {} if peft is None else {"adapter": str(folder / peft)}
    own = {} if peft is None else {"peft": str(folder / peft)}
    assert scores(ours(folder, **source), folder) == scores(theirs(folder, **own), folder)


def test_an_icarus_adapter_is_scored_through_the_two_streams(folder: Path) -> None:
    team = Specialists.load(str(folder / "base"), {"ours": folder / "ours"})
    model = ours(folder, adapter=str(folder / "ours"))
    results = model.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    with pytest.warns(UserWarning, match="icarus"):  # PEFT does not know the marker
        plain = theirs(folder, peft=str(folder / "ours"))
    wrong = plain.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (value, _), (other, _) in zip(PAIRS, results, wrong, strict=True):
        stripped = context.rstrip()
        begun = team.context().append(stripped or [model.prefix_token_id])
        wanted = sum(begun.score(context[len(stripped) :] + continuation, ["ours"])["ours"])
        assert value == pytest.approx(wanted, abs=1e-3)
        assert abs(value - other) > 0.05  # what lm-eval makes of it as plain LoRA


def test_an_icarus_adapter_generates_as_a_context_does(folder: Path) -> None:
    team = Specialists.load(str(folder / "base"), {"ours": folder / "ours"})
    model = ours(folder, adapter=str(folder / "ours"))
    options = {"until": ["\n"], "max_gen_toks": 8}
    said = model.generate_until(requests("generate_until", *((text, options) for text in ASKED)), disable_tqdm=True)
    assert said == [team.context().append(t).generate("ours", max_new_tokens=8, stop="\n").text for t in ASKED]


def test_rolling_likelihood_is_that_of_the_whole_text(folder: Path) -> None:
    team = Specialists.load(str(folder / "base"), {"ours": folder / "ours"})
    model = ours(folder, adapter=str(folder / "ours"))
    values = model.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in ASKED)), disable_tqdm=True)
    begun = team.context().append([model.prefix_token_id])
    assert values == pytest.approx([sum(begun.score(text, ["ours"])["ours"]) for text in ASKED], abs=1e-3)


def test_what_it_cannot_do_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="takes no peft; name the model with base and adapter"):
        ours(folder, peft="x")
    model = ours(folder, adapter=str(folder / "ours"))
    asked = requests("generate_until", ("a", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 2}))
    with pytest.raises(InputError, match="greedily"):
        model.generate_until(asked, disable_tqdm=True)


def test_the_harness_command_runs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # the command asks for cuda:0 all the same
    named = f"base={folder / 'base'},adapter={folder / 'ours'}"
    words = ["run", "--model", "icarus", "--model_args", named]
    words += ["--tasks", "sums", "--include_path", str(folder / "tasks")]
    monkeypatch.setattr("sys.argv", ["harness", *words])
    harness.cli_evaluate()
    assert "|sums " in capsys.readouterr().out
