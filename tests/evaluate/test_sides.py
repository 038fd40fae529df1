"""Each side answers as it does on its own: an ICaRus adapter in a context, a conventional one through PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from icarus import Specialists, adapter
from icarus.errors import AdapterError, InputError, UnsupportedModelError
from icarus.evaluate import Side, Sides, TokenRow
from icarus.evaluate.sides import Plain
from icarus.streams import IGNORED, EncoderCache
from saved import save_adapter, save_base
from tiny_models import tiny

PROMPTS = ["Who wrote the cache?", "b", "0123456789 and so on, much longer than the others", "x = "]
NAMES = ["base", "ours", "theirs"]


def save_conventional(folder: Path, seed: int = 5) -> Path:
    model = adapter.attach_conventional(tiny(), rank=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return adapter.save_conventional(model, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sides")
    save_base(folder / "base")
    save_adapter(folder / "ours")
    save_conventional(folder / "theirs")
    return folder


@pytest.fixture(scope="module")
def sides(folder: Path) -> Sides:
    return Sides.load(str(folder / "base"), {name: folder / name for name in NAMES[1:]})


@pytest.fixture(scope="module")
def team(folder: Path) -> Specialists:
    return Specialists.load(str(folder / "base"), {"ours": folder / "ours"})


@pytest.fixture(scope="module")
def peft_model(folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny(), folder / "theirs").eval()


def row(side: Side, prompt: str, answer: str) -> TokenRow:
    before = side.codec.encode(prompt)
    after = side.codec.encode(answer, after=before)
    return TokenRow([*before, *after], [IGNORED] * len(before) + after)


def alone(name: str, prompt: str, tokens: int, team: Specialists, peft_model: Any) -> list[int]:
    """What the same model generates on its own."""
    if name != "theirs":
        return team.context().append(prompt).generate(name, max_new_tokens=tokens).token_ids
    ids = torch.tensor([team.codec.encode(prompt)])
    mask = torch.ones_like(ids)
    out = peft_model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
    return out[0, ids.shape[1] :].tolist()


def test_the_marker_tells_the_kind(sides: Sides) -> None:
    assert sides.kinds == {"base": "base", "ours": "icarus", "theirs": "conventional"}


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_generates_what_each_prompt_does_alone(
    name: str, sides: Sides, team: Specialists, peft_model: Any
) -> None:
    with sides.side(name) as side:
        answers = side.generate([side.codec.encode(prompt) for prompt in PROMPTS], max_new_tokens=12)
    assert [a.token_ids for a in answers] == [alone(name, p, 12, team, peft_model) for p in PROMPTS]
    assert [a.text for a in answers] == [team.codec.decode(a.token_ids) for a in answers]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scores_as_each_row_does_alone(name: str, sides: Sides, team: Specialists, peft_model: Any) -> None:
    with sides.side(name) as side:
        rows = [row(side, prompt, "some answer"[: 3 + i]) for i, prompt in enumerate(PROMPTS)]
        scored = side.score(rows)
    for prompt, one, result in zip(PROMPTS, rows, scored, strict=True):
        if name == "theirs":
            ids = torch.tensor([one.input_ids])
            start = one.labels.count(IGNORED)
            every = peft_model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
            wanted = every.gather(1, ids[0, start:, None])[:, 0].tolist()
        else:
            answer = team.codec.decode(one.input_ids[one.labels.count(IGNORED) :])
            wanted = team.context().append(prompt).score(answer, [name])[name]
        assert result.log_probabilities == pytest.approx(wanted, abs=1e-4)


def check_together(side: Side, rows: list[TokenRow], tokens: int = 8) -> None:
    """``answer`` gives what ``score`` and ``generate`` do."""
    prompts = [one.input_ids[: one.labels.count(IGNORED)] for one in rows]
    scored, answers = zip(*side.answer(rows, max_new_tokens=tokens), strict=True)
    for ours, its in zip(scored, side.score(rows), strict=True):
        assert ours.log_probabilities == pytest.approx(its.log_probabilities, abs=1e-4)
        assert ours.greedy == its.greedy
    for ours, its in zip(answers, side.generate(prompts, max_new_tokens=tokens), strict=True):
        assert (ours.text, ours.token_ids, ours.finish_reason) == (its.text, its.token_ids, its.finish_reason)
        assert ours.drift == pytest.approx(its.drift, abs=1e-4)


@pytest.mark.parametrize("prompts", [PROMPTS, ["a", "b"]], ids=["of several lengths", "of one token"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_scored_and_answered_as_in_passes_of_their_own(name: str, prompts: list[str], sides: Sides) -> None:
    with sides.side(name) as side:
        check_together(side, [row(side, prompt, "some answer"[: 3 + 2 * i]) for i, prompt in enumerate(prompts)])


@pytest.mark.parametrize("prompts", [PROMPTS, ["a", "b"]], ids=["of several lengths", "of one token"])
@pytest.mark.parametrize("name", NAMES)
def test_choices_are_scored_as_rows_of_their_own(name: str, prompts: list[str], sides: Sides) -> None:
    texts = ["yes", "certainly not", "n"]
    with sides.side(name) as side:
        choices = [[row(side, prompt, text) for text in texts[: 1 + i % 3]] for i, prompt in enumerate(prompts)]
        for own, scored in zip(choices, side.choose(choices), strict=True):
            for one, result in zip(side.score(own), scored, strict=True):
                assert result.log_probabilities == pytest.approx(one.log_probabilities, abs=1e-4)


def test_choices_need_not_share_a_prompt(sides: Sides) -> None:
    """The first letter of a choice may make one token with the end of the prompt."""
    with sides.side("ours") as side:
        choices = [[row(side, "abc", "d"), row(side, "ab", "cd")], [row(side, "b", "c"), row(side, "b", "d")]]
        for own, scored in zip(choices, side.choose(choices), strict=True):
            for one, result in zip(own, scored, strict=True):
                assert result.log_probabilities == pytest.approx(side.score([one])[0].log_probabilities, abs=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_nor_does_a_sliding_window_matter(family: str, tmp_path: Path) -> None:
    with Sides.load(str(save_base(tmp_path / family, family=family))).side("base") as side:
        rows = [row(side, prompt * 2, "an answer") for prompt in PROMPTS]
        check_together(side, rows)
        for first, second in side.choose([[one, one] for one in rows]):
            assert first.log_probabilities == second.log_probabilities


def test_nor_the_models_last_position(tmp_path: Path) -> None:
    """A learned position is missing there, so padding must not stand behind it."""
    with Sides.load(str(save_base(tmp_path / "base", family="gpt2", max_position_embeddings=16))).side("base") as side:
        rows = [row(side, "0123456789abc", "d"), row(side, "a", "long answer")]
        check_together(side, rows, tokens=8)
        assert [len(one.log_probabilities) for (one,) in side.choose([[each] for each in rows])] == [1, 11]


def test_a_model_without_a_kv_cache_is_refused(tmp_path: Path) -> None:
    sides = Sides.load(str(save_base(tmp_path / "base", family="mamba", attention="eager")))
    with sides.side("base") as side, pytest.raises(UnsupportedModelError, match="mamba has no KV cache"):
        side.answer([row(side, "prompt", "answer")], max_new_tokens=2)


@pytest.mark.parametrize(("name", "passes"), [("base", 1), ("ours", 1), ("theirs", 2)])
def test_a_prompt_is_read_once_by_each_model(name: str, passes: int, sides: Sides) -> None:
    read = 0

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal read
        read += inputs[0].numel()

    with sides.side(name) as side:
        rows = [row(side, "0123456789" * 20, "answer")]
        hook = side.causal_lm.get_input_embeddings().register_forward_pre_hook(count)
        side.answer(rows, max_new_tokens=4)
        answered, read = read, 0
        side.choose([rows * 3])
        hook.remove()
    assert 200 * passes <= answered < 200 * passes + 40
    assert 200 <= read < 200 + 60


@pytest.mark.parametrize("name", NAMES)
def test_what_is_generated_is_greedy(name: str, sides: Sides) -> None:
    with sides.side(name) as side:
        prompts = [side.codec.encode(prompt) for prompt in PROMPTS]
        answers = side.generate(prompts, max_new_tokens=6)
        rows = [
            TokenRow([*p, *a.token_ids], [IGNORED] * len(p) + a.token_ids)
            for p, a in zip(prompts, answers, strict=True)
        ]
        assert all(result.greedy for result in side.score(rows))
        wrong = TokenRow(rows[0].input_ids, [*rows[0].labels[:-1], (rows[0].labels[-1] + 1) % 100])
        assert not side.score([wrong])[0].greedy


@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize("name", NAMES)
def test_drift_is_the_divergence_from_the_base_model(
    name: str, block: int, sides: Sides, team: Specialists, peft_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icarus.evaluate.sides._BLOCK", block)
    with sides.side(name) as side:
        prompts = [side.codec.encode(prompt) for prompt in PROMPTS]
        answers = side.generate(prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        cache, rows = EncoderCache(), len(answer.token_ids)
        base = team.streams.encode(ids, cache, logits_to_keep=rows)[0]
        own = peft_model(input_ids=ids).logits[0, -rows:]
        if name != "theirs":
            own = team.streams.decode(ids[:, -rows:], cache, team.adapter(name))[0]
        p, q = own.log_softmax(-1), base.log_softmax(-1)
        assert answer.drift == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)
        assert (answer.drift > 0.01) == (name != "base")


def test_an_icarus_adapter_through_peft_would_give_other_results(sides: Sides) -> None:
    """Which is why the kind is told by the marker."""
    with sides.side("ours") as side:
        rows = [row(side, prompt, "an answer") for prompt in PROMPTS]
        plain = Plain(side.model, side.codec, "conventional")
        pairs = zip(side.score(rows), plain.score(rows), strict=True)
        assert all(ours.log_probabilities != pytest.approx(its.log_probabilities, abs=0.1) for ours, its in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_a_side_leaves_the_base_model_as_it_was(name: str, sides: Sides) -> None:
    ids = torch.arange(4, 20)[None]
    before = sides.model(input_ids=ids).logits
    with sides.side(name) as side:
        assert torch.equal(side.model(input_ids=ids).logits, before) == (name == "base")
    assert torch.equal(sides.model(input_ids=ids).logits, before)
    assert not any("lora" in path for path, _ in sides.model.named_modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_string_ends_one_answer_and_no_other(name: str, sides: Sides) -> None:
    with sides.side(name) as side:
        prompts = [side.codec.encode(prompt) for prompt in PROMPTS]
        whole = side.generate(prompts, max_new_tokens=8)
        stop = whole[0].text[2:4]
        cut = side.generate(prompts, max_new_tokens=8, stop=[stop])
    for before, after in zip(whole, cut, strict=True):
        assert after.text == before.text.partition(stop)[0]
    assert cut[0].finish_reason == "stop"
    assert len(cut[0].token_ids) < len(whole[0].token_ids)


def test_an_answer_ends_at_the_models_last_position(tmp_path: Path) -> None:
    sides = Sides.load(str(save_base(tmp_path / "base", max_position_embeddings=16)))
    with sides.side("base") as side:
        short, long = side.generate([side.codec.encode("abc"), side.codec.encode("0123456789abc")], max_new_tokens=9)
    assert (len(short.token_ids), len(long.token_ids)) == (9, 3)
    assert long.finish_reason == "length"


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path) -> None:
    base = str(folder / "base")
    with pytest.raises(InputError, match="cannot be named 'base'"):
        Sides.load(base, {"base": folder / "ours"})
    with pytest.raises(AdapterError, match="no such directory"):
        Sides.load(base, {"gone": tmp_path / "gone"})
    other = save_base(tmp_path / "other", seed=9)
    with pytest.raises(AdapterError, match="another base model"):
        Sides.load(str(other), {"ours": folder / "ours"})
    with pytest.raises(InputError, match="No side is named 'who'; there are base"), Sides.load(base).side("who"):
        pass
