"""One context, several speakers, against the reference and against fresh contexts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import reference
import saved
from icarus import adapter
from icarus.adapter import checks, fingerprints
from icarus.context import BASE, Context, Specialists
from icarus.errors import AdapterError, IcarusError, InputError
from icarus.lora import LoraLayers
from icarus.streams import EncoderCache
from tiny_models import CHATML, SPECIAL, STRIPPING, VOCAB, lora_of, shape_of, tiny, tiny_tokenizer, with_adapters

END = SPECIAL.index("<|im_end|>")
BYTES_A_TOKEN = 3 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head size, float32
TWO_AT_ONCE = GenerationConfig(do_sample=True, num_return_sequences=2)
PROMPT = "Who wrote the cache?"
parallel_or_not = pytest.mark.parametrize("parallel", [True, False])


def _team(template: str | None = CHATML, **options: Any) -> Specialists:
    model = tiny(**options)
    model.generation_config.eos_token_id = END
    return Specialists(with_adapters(model), tiny_tokenizer(template))


@pytest.fixture(scope="module")
def team() -> Specialists:
    return _team()


@pytest.fixture(scope="module")
def paper() -> Callable[[str, list[int]], torch.Tensor]:
    """(T, V) logits of a speaker for a whole sequence, by the equations."""
    model = tiny()
    weights, shape = {k: v.clone() for k, v in model.state_dict().items()}, shape_of(model.config)
    adapted = with_adapters(model)
    loras: dict[str, Any] = {name: lora_of(adapted, name) for name in ("one", "two")}
    return lambda who, ids: reference.two_streams(weights, loras.get(who, {}), torch.tensor(ids), shape).logits


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every position that reaches a cache, in order, whoever reports what."""
    positions: list[int] = []
    append = EncoderCache.append

    def spy(cache: EncoderCache, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Any:
        if layer == 0:
            positions.extend(range(cache.length, cache.length + keys.shape[2]))
        return append(cache, layer, keys, values)

    monkeypatch.setattr(EncoderCache, "append", spy)
    return positions


def _fixed(tokens: int, ends: bool = False, **more: Any) -> GenerationConfig:
    """Greedy, exactly so many tokens, no special ones; EOS last if asked."""
    forced = {"forced_eos_token_id": END, "max_new_tokens": tokens} if ends else {"max_new_tokens": tokens}
    held_back = [0, 1, 3] if ends else [0, 1, 2, 3]
    early = {"begin_suppress_tokens": None, "min_new_tokens": tokens - 1} if ends else {}
    return GenerationConfig(do_sample=False, suppress_tokens=held_back, eos_token_id=END, **forced, **early, **more)


def _same(left: Context, right: Context) -> bool:
    return (left.token_ids, left.messages) == (right.token_ids, right.messages)


# ---------------------------------------------------------------------------------------- switching speakers


def _switch(team: Specialists, paper: Any, encoded: list[int], parallel: bool, lengths: tuple[int, ...]) -> None:
    context = team.context(parallel=parallel).append(PROMPT)
    want = list(context.token_ids)
    for who, length in zip(("one", "two", BASE, "one", BASE, "two"), lengths, strict=True):
        turn = context.generate(who, max_new_tokens=length)
        for _ in range(len(turn.token_ids)):
            want.append(int(paper(who, want)[-1].argmax()))
        assert context.token_ids == want
        assert turn.finish_reason == ("stop" if want[-1] == END else "length")
        assert turn.finish_reason == "stop" or len(turn.token_ids) == length
        assert turn.encoded_tokens + turn.cached_tokens == len(want) - 1
    assert encoded == list(range(len(want) - 1))


@parallel_or_not
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1, 1), (5, 3, 1, 7, 2, 4)])
def test_speakers_switch_at_any_token(
    team: Specialists, paper: Any, encoded: list[int], parallel: bool, lengths: tuple[int, ...]
) -> None:
    _switch(team, paper, encoded, parallel, lengths)


@pytest.mark.parametrize("fault", ["the adapter writes K/V", "a switch computes again"])
def test_that_switching_test_sees(
    fault: str, team: Specialists, paper: Any, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "the adapter writes K/V":
        monkeypatch.setattr(LoraLayers, "off", lambda self: nullcontext())
    else:
        run = Context._run
        monkeypatch.setattr(Context, "_run", lambda self, *a: (self._cache.truncate(0), run(self, *a)))
    with pytest.raises(AssertionError):
        _switch(team, paper, encoded, False, (5, 3, 1, 7, 2, 4))


def test_the_speakers_differ(team: Specialists) -> None:
    said = [team.context().append(PROMPT).generate(who, max_new_tokens=12).token_ids for who in team.names]
    assert len({tuple(s) for s in said}) == len(team.names) == 3


@parallel_or_not
def test_every_token_of_a_long_conversation_is_encoded_once(
    team: Specialists, encoded: list[int], parallel: bool
) -> None:
    context, counted, cached = team.context(parallel=parallel), 0, 0
    for number in range(8):
        context.append([{"role": "user", "content": f"Question {number}."}])
        held = context.length
        turn = context.generate(team.names[number % 3], generation_config=_fixed(9, ends=number % 2 == 0))
        assert turn.cached_tokens == held
        counted, cached = counted + turn.encoded_tokens, cached + held
        assert turn.kv_bytes == context.kv_bytes == BYTES_A_TOKEN * context.length
    assert encoded == list(range(len(context.token_ids) - 1))
    assert context.length == context.encoded_tokens == counted == len(encoded)
    assert cached > 0


@pytest.mark.parametrize("bare", [True, False])
def test_the_base_model_says_what_transformers_says(bare: bool) -> None:
    model, tokenizer = tiny(), tiny_tokenizer()
    model.generation_config.eos_token_id = END
    model.generation_config.repetition_penalty = 1.3
    team = Specialists(tiny() if bare else with_adapters(tiny()), tokenizer)
    team.context()._causal_lm().generation_config = model.generation_config
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    want = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
    assert team.context().append(PROMPT).generate(max_new_tokens=30).token_ids == want
    model.generation_config.repetition_penalty = 1.0
    assert model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist() != want


# ---------------------------------------------------------------------------------------- fork and roll back


@parallel_or_not
def test_forks_continue_as_fresh_contexts_would(team: Specialists, encoded: list[int], parallel: bool) -> None:
    def start() -> Context:
        context = team.context(parallel=parallel).append([{"role": "user", "content": "Hi"}])
        context.generate("one", generation_config=_fixed(7))
        return context

    def go_on(context: Context, who: str) -> Context:
        context.generate(who, generation_config=_fixed(5, ends=True))
        context.append([{"role": "user", "content": who}]).generate(who, generation_config=_fixed(5))
        return context

    origin = start()
    before, cost = origin.token_ids[:], len(encoded)
    forks = [origin.fork() for _ in range(2)]
    assert len(encoded) == cost
    assert all(fork.kv_bytes == origin.kv_bytes and fork.length == origin.length for fork in forks)
    for fork, who in zip(forks, ("two", BASE), strict=True):
        assert _same(go_on(fork, who), go_on(start(), who))
    assert origin.token_ids == before
    assert _same(go_on(origin, "one"), go_on(start(), "one"))


def _chat(team: Specialists, questions: int, answer: GenerationConfig) -> Context:
    context = team.context()
    for number in range(questions):
        context.append([{"role": "user", "content": f"Q{number}?"}]).generate(
            ("one", "two")[number % 2], generation_config=answer
        )
    return context


@pytest.mark.parametrize("ends", [True, False])
def test_rollback_between_turns_is_as_if_they_had_never_been(team: Specialists, ends: bool) -> None:
    answer = _fixed(8, ends)
    short, long = _chat(team, 1, answer), _chat(team, 3, answer)
    assert long.token_ids[: len(short.token_ids)] == short.token_ids
    long.rollback(len(short.token_ids))
    assert _same(long, short)
    for context in (short, long):
        context.append([{"role": "user", "content": "Again."}]).generate("two", generation_config=answer)
    assert _same(long, short)


@pytest.mark.parametrize("kept", range(1, 8))
def test_rollback_into_an_answer_is_as_if_it_had_been_cut_there(team: Specialists, kept: int, encoded: Any) -> None:
    cut, rolled = _chat(team, 1, _fixed(8)), _chat(team, 1, _fixed(8))
    rolled.append([{"role": "user", "content": "More"}]).generate("two", generation_config=_fixed(4))
    start = len(cut.token_ids) - 8
    fresh = team.context().append([{"role": "user", "content": "Q0?"}])
    fresh.generate("one", generation_config=_fixed(kept))
    cost = len(encoded)
    for context in (cut, rolled):
        context.rollback(start + kept)
        assert _same(context, fresh)
        assert context.length == start + kept
    assert len(encoded) == cost
    for context in (cut, rolled, fresh):
        context.generate("two", generation_config=_fixed(3))
        context.append([{"role": "user", "content": "And?"}]).generate("one", generation_config=_fixed(3))
    assert _same(cut, fresh)
    assert _same(rolled, fresh)


BARE = (  # as Llama 2's: nothing is written before an answer
    "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content + '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, BARE])
def test_a_turn_that_was_rolled_back_or_refused_leaves_no_answer(template: str) -> None:
    context = _team(template).context().append([{"role": "user", "content": "Q"}])
    fresh, length = context.fork(), len(context.token_ids)
    context.generate("one", generation_config=_fixed(4))
    assert len(context.messages) == 2
    assert _same(context.rollback(length), fresh)
    limit = context.team.streams.config.max_position_embeddings
    context.append([{"role": "user", "content": "x" * limit}])
    before = context.messages
    with pytest.raises(InputError, match="roll it back"):
        context.generate("one")
    assert context.messages == before
    for each in (context.rollback(length), fresh):
        each.append([{"role": "user", "content": "R"}]).generate("two", generation_config=_fixed(4))
    assert _same(context, fresh)


def test_rollback_again_and_again(team: Specialists) -> None:
    context = _chat(team, 3, _fixed(6))
    whole = context.fork()
    for length in range(len(whole.token_ids), -1, -1):
        assert _same(context.rollback(length), whole.fork().rollback(length)), length
    assert (context.token_ids, context.messages) == ([], [])


@pytest.mark.parametrize("length", [3, 12, 20])
def test_rollback_of_plain_text_continues_as_a_fresh_context(team: Specialists, paper: Any, length: int) -> None:
    context = team.context().append("0123456789")
    context.generate("one", max_new_tokens=15)
    context.rollback(length)
    want = list(context.token_ids)
    for who in ("two", "one"):
        want.append(int(paper(who, want)[-1].argmax()))
        context.generate(who, max_new_tokens=1)
    assert context.token_ids == want


# --------------------------------------------------------------------------------------------------- score


def _situations() -> dict[str, Callable[[Context], Any]]:
    return {
        "nothing is encoded": lambda c: c,
        "the last token is not encoded": lambda c: c.generate("one", max_new_tokens=4),
        "all is encoded": lambda c: (c.generate("one", max_new_tokens=4), c.rollback(len(c.token_ids) - 2)),
        "much is not encoded": lambda c: (c.generate("one", max_new_tokens=4), c.append("and more text")),
    }


@pytest.mark.parametrize("situation", _situations())
@pytest.mark.parametrize("text", ["a", "ab", "a longer text"])
def test_score_is_the_references_and_changes_nothing(
    team: Specialists, paper: Any, situation: str, text: str, encoded: list[int]
) -> None:
    context, twin = (team.context().append(PROMPT) for _ in range(2))
    for each in (context, twin):
        _situations()[situation](each)
    before, cached = list(context.token_ids), context.length
    del encoded[:]
    scores = context.score(text)
    assert encoded == list(range(cached, len(before) + len(text) - 1))  # once for all speakers
    ids = before + context.team.codec.encode(text)
    for who in team.names:
        predicted = paper(who, ids).log_softmax(-1)[len(before) - 1 : -1]
        want = predicted[range(len(text)), ids[len(before) :]]
        torch.testing.assert_close(torch.tensor(scores[who]), want, rtol=1e-4, atol=1e-4)
    assert context.score(text, ["two"])["two"] == pytest.approx(scores["two"], abs=1e-4)
    assert context.token_ids == before
    assert cached <= context.length == context.encoded_tokens or situation == "all is encoded"
    assert context.kv_bytes == BYTES_A_TOKEN * context.length
    for who in ("two", BASE, "one"):
        assert context.generate(who, max_new_tokens=3).token_ids == twin.generate(who, max_new_tokens=3).token_ids


def test_score_ranks_what_a_specialist_says(team: Specialists) -> None:
    """Greedy text has the highest score at each of its tokens under the one who said it."""
    said = team.context().append(PROMPT).generate("one", generation_config=_fixed(6)).text
    scores = team.context().append(PROMPT).score(said)
    assert sum(scores["one"]) > max(sum(scores["two"]), sum(scores[BASE]))


# ------------------------------------------------------------------------------------------------ sampling


def _sampled(team: Specialists, who: str = "one", **options: Any) -> list[int]:
    return team.context().append(PROMPT).generate(who, max_new_tokens=20, **options).token_ids


@pytest.mark.parametrize("who", ["one", BASE])
def test_sampling(team: Specialists, who: str) -> None:
    hot = {"temperature": 1.5}
    assert _sampled(team, who, **hot, seed=1) == _sampled(team, who, **hot, seed=1)
    assert len({tuple(_sampled(team, who, **hot, seed=s)) for s in (1, 2, None, None)}) == 4
    greedy = _sampled(team, who)
    assert _sampled(team, who, **hot, seed=1, top_k=1) == greedy
    assert _sampled(team, who, **hot, seed=1, top_p=1e-6) == greedy
    assert _sampled(team, who, temperature=1e-4, seed=1) == greedy
    assert _sampled(team, who, **hot, seed=1) != greedy


def test_sampling_draws_from_the_models_distribution(team: Specialists, paper: Any) -> None:
    """Frequencies of the first token over many seeds against the reference's probabilities."""
    context = team.context().append(PROMPT)
    wanted = paper("one", context.token_ids)[-1].div(0.7).softmax(-1)
    counts = torch.zeros(VOCAB)
    for seed in range(300):
        turn = context.fork().generate("one", max_new_tokens=1, temperature=0.7, seed=seed)
        counts[turn.token_ids[0]] += 1
    assert (counts / 300 - wanted).abs().sum() / 2 < (1 / VOCAB - wanted).abs().sum() / 4


def test_seed_leaves_the_global_generator_alone(team: Specialists) -> None:
    before = torch.get_rng_state()
    _sampled(team, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------- the end of a turn


@pytest.fixture
def whole(team: Specialists) -> str:
    return team.context().append(PROMPT).generate("one", generation_config=_fixed(12)).text


@pytest.mark.parametrize("stops", [slice(4, 6), slice(7, 8)])
def test_stop_strings_end_the_turn_and_are_cut(team: Specialists, whole: str, stops: slice) -> None:
    stop = whole[stops]
    end = whole.index(stop)
    context = team.context().append(PROMPT)
    turn = context.generate("one", generation_config=_fixed(12, stop_strings=["never said", stop]))
    assert (turn.text, turn.finish_reason) == (whole[:end], "stop")
    assert context.text == PROMPT + whole[:end] + stop
    assert team.context().append(PROMPT).generate("one", max_new_tokens=12, stop=stop).text == whole[:end]


def test_eos_ends_the_turn_and_is_not_text(team: Specialists) -> None:
    context = team.context().append(PROMPT)
    turn = context.generate("one", generation_config=_fixed(6, ends=True))
    assert turn.token_ids[-1] == END
    assert turn.finish_reason == "stop"
    assert "<|im_end|>" not in turn.text
    assert context.text.endswith("<|im_end|>")


def test_length_ends_the_turn(team: Specialists, whole: str) -> None:
    turn = team.context().append(PROMPT).generate("one", generation_config=_fixed(5))
    assert (turn.text, turn.finish_reason, len(turn.token_ids)) == (whole[:5], "length", 5)


@pytest.mark.parametrize("seed", range(5))
def test_streamed_pieces_are_the_text(team: Specialists, seed: int) -> None:
    pieces: list[str] = []
    blanks = GenerationConfig(
        do_sample=True, temperature=2.0, max_new_tokens=40, sequence_bias=[[[5], 4.0], [[4], 4.0]]
    )
    turn = team.context().append(PROMPT).generate("one", generation_config=blanks, seed=seed, stream=pieces.append)
    assert "".join(pieces) == turn.text
    assert len(pieces) > 1


def test_streamed_pieces_are_the_text_without_the_stop_string(team: Specialists, whole: str) -> None:
    pieces: list[str] = []
    config = _fixed(12, stop_strings=[whole[6:8]])
    turn = team.context().append(PROMPT).generate("one", generation_config=config, stream=pieces.append)
    assert "".join(pieces) == turn.text


@pytest.mark.parametrize("setting", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}])
def test_a_generation_config_is_honoured(team: Specialists, paper: Any, setting: dict[str, Any]) -> None:
    context = team.context().append("aaaa")
    turn = context.generate("one", generation_config=_fixed(20, **setting))
    plain = team.context().append("aaaa").generate("one", generation_config=_fixed(20))
    assert turn.token_ids != plain.token_ids
    if "no_repeat_ngram_size" in setting:
        assert len(set(turn.token_ids)) == 20


def test_a_generation_config_samples_as_the_options_do(team: Specialists) -> None:
    config = GenerationConfig(do_sample=True, temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=20)
    got = team.context().append(PROMPT).generate("one", generation_config=config, seed=4).token_ids
    assert got == _sampled(team, temperature=1.5, seed=4)


def test_what_a_generation_config_leaves_open_is_the_models() -> None:
    """As in Transformers: Qwen3's own generation config samples, so a config that does not say samples too."""
    team = _team()
    own = team.context()._causal_lm().generation_config
    own.do_sample, own.temperature, own.top_k = True, 1.5, 0
    got = (
        team.context()
        .append(PROMPT)
        .generate("one", generation_config=GenerationConfig(max_new_tokens=20), seed=4)
        .token_ids
    )
    assert got == _sampled(team, temperature=1.5, seed=4)
    assert got != _sampled(team)


# ---------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("template", [CHATML, STRIPPING])
def test_a_chat_is_what_the_template_makes_of_it(template: str) -> None:
    team = _team(template)
    context = team.context().append([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}])
    for who, question in (("one", "And?"), ("two", "So?"), (BASE, "Bye.")):
        context.generate(who, generation_config=_fixed(8, ends=True))
        context.append([{"role": "user", "content": question}])
    want = team.tokenizer.apply_chat_template(context.messages, tokenize=True, return_dict=False)
    assert [m["role"] for m in context.messages] == ["system"] + ["user", "assistant"] * 3 + ["user"]
    assert all(len(m["content"]) == 7 for m in context.messages if m["role"] == "assistant")
    assert context.token_ids == want


@pytest.mark.parametrize("speakers", [("one",), ("one", "two", BASE)])
def test_a_turn_cut_short_is_closed_by_the_next_append(team: Specialists, speakers: tuple[str, ...]) -> None:
    context = team.context().append([{"role": "user", "content": "Hi"}])
    for who in speakers:  # the next one goes on with the same answer
        context.generate(who, generation_config=_fixed(4))
    context.append([{"role": "user", "content": "Go on"}])
    assert len(context.messages) == 3
    assert len(context.messages[1]["content"]) == 4 * len(speakers)
    assert context.token_ids == team.tokenizer.apply_chat_template(context.messages, return_dict=False)


def test_text_appended_to_an_answer_is_part_of_it(team: Specialists) -> None:
    context = team.context().append([{"role": "user", "content": "Hi"}])
    context.generate("one", generation_config=_fixed(4))
    context.append(" mid ").generate("two", generation_config=_fixed(4))
    context.append([{"role": "user", "content": "Go on"}])
    assert " mid " in context.messages[1]["content"]
    assert context.token_ids == team.tokenizer.apply_chat_template(context.messages, return_dict=False)


def test_an_answer_that_ends_with_another_end_token_is_closed_once() -> None:
    """Base models' generation configs often name <|endoftext|>, and callers the chat's end."""
    team = _team()
    team.context()._causal_lm().generation_config.eos_token_id = 0
    context = team.context().append([{"role": "user", "content": "Hi"}])
    assert context.generate("one", generation_config=_fixed(5, ends=True)).finish_reason == "stop"
    context.append([{"role": "user", "content": "Go on"}])
    assert context.token_ids == team.tokenizer.apply_chat_template(context.messages, return_dict=False)


def test_a_template_that_strips_thinking_rewrites_nothing(encoded: list[int]) -> None:
    team = _team(STRIPPING)
    context = team.context().append([{"role": "user", "content": "Hi"}])
    context.generate("one", generation_config=_fixed(4))
    context.append("</think>").generate("one", generation_config=_fixed(6, ends=True))
    before = list(context.token_ids)
    context.append([{"role": "user", "content": "And?"}]).generate("two", generation_config=_fixed(4))
    assert context.token_ids[: len(before)] == before
    assert encoded == list(range(len(context.token_ids) - 1))
    said = context.messages[1]["content"]
    assert "</think>" in said
    assert said.split("</think>")[0] in context.text  # the template alone would have dropped it
    assert said not in team.tokenizer.apply_chat_template(context.messages, tokenize=False)


def test_a_template_that_hides_the_answers_text_is_refused() -> None:
    shouting = CHATML.replace("m['content']", "m['content'] | upper")
    context = _team(shouting).context().append([{"role": "user", "content": "Hi"}])
    context.generate("one", generation_config=_fixed(4))
    before = list(context.token_ids)
    with pytest.raises(InputError, match=r"template.*answer"):
        context.append([{"role": "user", "content": "And?"}])
    assert context.token_ids == before


def test_history_that_the_template_would_rewrite_is_refused() -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hm</think>Hello"}]
    context = _team(STRIPPING).context().append(history)
    before = list(context.token_ids)
    with pytest.raises(InputError, match="rewrites earlier messages"):
        context.append([{"role": "user", "content": "And?"}])
    assert (context.token_ids, context.messages) == (before, history)


# ---------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda c: c.rollback(0).generate("one"), "context is empty"),
        (lambda c: c.rollback(0).score("text"), "non-empty context"),
        (lambda c: c.score(""), "non-empty text"),
        (lambda c: c.generate("three"), "'three'.*base, one, two"),
        (lambda c: c.score("text", ["three"]), "'three'.*base, one, two"),
        (lambda c: c.append([5, VOCAB]), f"{VOCAB} is not a token id.*{VOCAB - 1}"),
        (lambda c: c.append([-1]), "-1 is not a token id"),
        (lambda c: c.append(["x"]), "'x' is not a token id"),
        (lambda c: c.append([1.0]), "1.0 is not a token id"),
        (lambda c: c.append([{"role": "user"}]), "'role': 'user'.*no text in 'content'"),
        (lambda c: c.append([{"role": "user", "content": [{"type": "image"}]}]), "no text in 'content'"),
        (lambda c: c.append([{"content": "x"}]), "not a chat message"),
        (lambda c: c.append([{"role": "user", "content": "x"}, "y"]), "'y' is not a chat message"),
        (lambda c: c.append({"role": "user", "content": "x"}), "'content': 'x'.*list of messages"),
        (lambda c: c.append(None), "None cannot be appended"),
        (lambda c: c.generate("one", temperature=-1), "temperature=-1"),
        (lambda c: c.generate("one", temperature=float("nan")), "temperature=nan"),
        (lambda c: c.generate("one", top_p=0, temperature=1), "top_p=0"),
        (lambda c: c.generate("one", top_p=1.5), "top_p=1.5"),
        (lambda c: c.generate("one", top_k=-1), "top_k=-1"),
        (lambda c: c.generate("one", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda c: c.generate("one", stop=""), "stop=''.*empty"),
        (lambda c: c.generate("one", stop=["x", ""]), "stop=.*empty"),
        (lambda c: c.generate("one", generation_config=GenerationConfig(num_beams=2)), "Beam search"),
        (lambda c: c.generate("one", generation_config=TWO_AT_ONCE), "fork"),
        (lambda c: c.rollback(99), "99 tokens; this context has 20"),
        (lambda c: c.rollback(-1), "-1 tokens"),
        (lambda c: c.team.add(BASE, "."), "'base'"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(team: Specialists, act: Callable[[Context], Any], said: str) -> None:
    context = team.context().append(PROMPT)
    with pytest.raises(InputError, match=rf"(?s){said}") as caught:
        act(context)
    assert str(caught.value).endswith(".")
    assert context.token_ids in ([], context.team.codec.encode(PROMPT))
    assert context.length == 0


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(InputError, match="no chat template"):
        _team(None).context().append([{"role": "user", "content": "Hi"}])


def test_what_a_template_refuses_is_an_input_error() -> None:
    refusing = "{{ raise_exception('Only users may speak') }}"
    with pytest.raises(IcarusError, match="Only users may speak"):
        _team(refusing).context().append([{"role": "tool", "content": "Hi"}])


# ----------------------------------------------------------------------------------------------- accidents


@parallel_or_not
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("after_a_turn", [True, False])
def test_an_accident_leaves_the_context_as_before_the_turn(
    team: Specialists, chat: bool, after_a_turn: bool, parallel: bool
) -> None:
    def start() -> Context:
        context = team.context(parallel=parallel)
        if after_a_turn:
            context.append([{"role": "user", "content": "Hi"}] if chat else "Hi")
            context.generate("one", generation_config=_fixed(6))
        return context.append([{"role": "user", "content": "More"}] if chat else "More")

    class AccidentError(Exception):
        pass

    def fail(piece: str) -> None:
        raise AccidentError

    context, fresh = start(), start()
    with pytest.raises(AccidentError):
        context.generate("two", max_new_tokens=60, temperature=2.0, seed=1, stream=fail)
    assert _same(context, fresh)
    for each in (context, fresh):
        each.generate("two", generation_config=_fixed(4))
        each.append([{"role": "user", "content": "x"}] if chat else "x").generate("one", generation_config=_fixed(4))
    assert _same(context, fresh)
    assert _same(context.rollback(9), fresh.rollback(9))


def test_the_base_is_hashed_once_for_all_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [saved.save_adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    hashed = []

    def hashing(model: Any) -> str:
        hashed.append(model)
        return fingerprints.fingerprint(model)

    monkeypatch.setattr(adapter, "fingerprint", hashing)
    monkeypatch.setattr(checks, "fingerprint", hashing)
    team = Specialists(tiny(), tiny_tokenizer())
    assert not hashed
    for folder in folders:
        team.add(folder.name, folder)
    assert team.names == [BASE, "one", "two"]
    assert len(hashed) == 1
    foreign = adapter.save(adapter.attach(tiny(seed=5)), tmp_path / "foreign")
    with pytest.raises(AdapterError, match="another base model"):
        team.add("foreign", foreign)


def test_a_context_ends_where_the_model_does(team: Specialists) -> None:
    limit = team.streams.config.max_position_embeddings
    context = team.context().append([5] * (limit - 3))
    turn = context.generate(max_new_tokens=50, generation_config=None)
    assert len(turn.token_ids) <= 3
    context.rollback(0).append([5] * limit)
    with pytest.raises(InputError, match=f"has {limit} tokens and this model takes {limit}"):
        context.generate()


@pytest.mark.parametrize("ids", [torch.tensor([[5, 6]]), torch.tensor([5, 6]).numpy(), [torch.tensor(5).item(), 6]])
def test_token_ids_of_tensors_and_arrays(team: Specialists, ids: Any) -> None:
    assert team.context().append(ids).token_ids == [5, 6]


def test_booleans_are_no_token_ids(team: Specialists) -> None:
    with pytest.raises(InputError, match="True is not a token id"):
        team.context().append([True, False])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"generation_config": GenerationConfig(max_new_tokens=2), "temperature": 1.0}, "would be ignored"),
        ({"seed": 2**70}, "seed is"),
    ],
)
def test_options_that_cannot_hold_are_refused(team: Specialists, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        team.context().append([5, 6]).generate(**options)


def test_former_names_give_what_they_gave_and_warn(team: Specialists) -> None:
    context = team.context().append(PROMPT)
    turns = [context.generate(who, max_new_tokens=2) for who in ("one", "two")]
    with pytest.warns(DeprecationWarning, match=r"Context\.length"):
        assert context.cached_tokens == context.length == len(context.token_ids) - 1
    with pytest.warns(DeprecationWarning, match=r"add up Turn\.cached_tokens"):
        assert context.reused_tokens == sum(turn.cached_tokens for turn in turns)
    with pytest.warns(DeprecationWarning, match=r"Turn\.cached_tokens") as caught:
        assert turns[1].reused_tokens == turns[1].cached_tokens == turns[0].encoded_tokens
    assert caught[0].filename == __file__  # where the name is used
