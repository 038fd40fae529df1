"""Items through sides: tokens as in training, one result an item."""

from __future__ import annotations

from typing import Any

import pytest

from icarus import Specialists
from icarus.chat_template import Codec
from icarus.errors import InputError
from icarus.evaluate import Item, Scored, Side, Sides, Task, evaluate
from icarus.evaluate.run import _asked
from icarus.streams import IGNORED
from icarus.train.data import tokenize
from tiny_models import tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def sides(team: Specialists, home: Any) -> Sides:
    return Sides.load(str(home / "base"), {name: home / name for name in ("one", "two")})


def chat(number: int) -> Item:
    prompt = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "why " * number}]
    completion = [{"role": "assistant", "content": f"because {number}"}]
    return Item(name=str(number), row={"prompt": prompt, "completion": completion}, reference=f"because {number}")


def choices(number: int, right: int) -> Item:
    row = {"prompt": "2 + 2 = " * number, "completions": ["4", "five", "66"]}
    return Item(name=f"choice {number}", row=row, reference=right)


CHATS = Task(name="chats", items=[chat(n) for n in (1, 5, 3, 2, 4)], scorer="token_f1", max_new_tokens=6)
CHOICES = Task(name="choices", items=[choices(n, n % 3) for n in (1, 2, 3)], scorer="choice")


def test_items_have_the_tokens_of_training_rows() -> None:
    codec = Codec(tiny_tokenizer())
    for item in CHATS.items:
        trained = tokenize(item.row, codec, None)
        asked = _asked(item, codec)
        assert (asked.rows[0].input_ids, asked.rows[0].labels) == (trained["input_ids"], trained["labels"])
        prompt = asked.rows[0].input_ids[: asked.rows[0].labels.count(IGNORED)]
        assert codec.decode(prompt, special=True) == codec.render(item.row["prompt"], header=True)


def test_results_are_those_of_contexts(sides: Sides, team: Specialists) -> None:
    results = list(evaluate(sides, CHATS, batch_size=2))
    assert [(r.side, r.item) for r in results] == [(s, str(n)) for s in ("base", "one", "two") for n in (5, 4, 3, 2, 1)]
    by_name = {item.name: item for item in CHATS.items}
    for result in results:
        item = by_name[result.item]
        context = team.context().append(item.row["prompt"])
        turn = context.fork().generate(result.side, max_new_tokens=6)
        assert (result.text, result.generated_tokens) == (turn.text, len(turn.token_ids))
        header = team.codec.render(item.row["prompt"], header=True)
        answer = team.codec.render([*item.row["prompt"], *item.row["completion"]]).removeprefix(header).rstrip("\n")
        opened = team.context().append(team.codec.encode(header, rendered=True))
        losses = opened.score(answer, [result.side])[result.side]
        assert result.tokens == len(losses)
        assert result.loss == pytest.approx(-sum(losses) / len(losses), abs=1e-4)
        assert result.score == CHATS.score(result.text, item)


def test_the_most_likely_choice_is_the_answer(sides: Sides, team: Specialists) -> None:
    end = str(team.tokenizer.eos_token)
    for result in evaluate(sides, CHOICES, batch_size=2):
        item = next(item for item in CHOICES.items if item.name == result.item)
        context = team.context().append(item.row["prompt"])
        sums = [sum(context.score(c + end, [result.side])[result.side]) for c in item.row["completions"]]
        best = sums.index(max(sums))
        assert result.text == item.row["completions"][best]
        assert result.score == (best == item.reference)
        length = len(item.row["completions"][item.reference]) + 1
        assert (result.tokens, result.loss) == (length, pytest.approx(-sums[item.reference] / length, abs=1e-4))


def test_what_is_done_is_not_done_again(sides: Sides) -> None:
    everything = list(evaluate(sides, CHATS, ["one", "base"], batch_size=8))
    done = [(r.side, r.item) for r in everything[:7]]
    rest = evaluate(sides, CHATS, ["one", "base"], batch_size=1, done=done)
    assert [(r.side, r.item, r.text) for r in rest] == [(r.side, r.item, r.text) for r in everything[7:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer": "bleu"}, "no known scorer 'bleu'; take one of choice, code, exact_match"),
        ({"items": []}, "Task chats has no items"),
        ({"scorer": "choice"}, "1: scorer 'choice' needs choices"),
        ({"items": CHOICES.items}, "choice 1: scorer 'token_f1' needs one completion"),
        ({"items": [choices(1, 3)], "scorer": "choice"}, "the right choice is 3; give its index, from 0 to 2"),
        ({"items": [Item(name="x:1", row=chat(1).row, reference=None)]}, "x:1 has no reference"),
        ({"items": [Item(name="x:2", row={"text": "a"}, reference="a")]}, "x:2 has no prompt"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Task(**{"name": "chats", "items": CHATS.items, "scorer": "token_f1", **change})


def test_an_item_that_does_not_fit_is_named(sides: Sides) -> None:
    long = Item(name="data.jsonl:3", row={"prompt": "a" * 600, "completion": "b"}, reference="b")
    with pytest.raises(InputError, match=r"data.jsonl:3 has 602 tokens and this model takes 512"):
        list(evaluate(sides, Task(name="long", items=[long], scorer="exact_match")))
    silent = [{"role": "user", "content": "b"}]
    mute = Item(name="data.jsonl:4", row={"prompt": silent, "completion": silent}, reference="b")
    with pytest.raises(InputError, match=r"data.jsonl:4: the completion has no tokens"):
        list(evaluate(sides, Task(name="mute", items=[mute], scorer="exact_match")))


@pytest.mark.parametrize("task", [CHATS, CHOICES])
def test_a_model_that_gives_no_numbers_is_not_scored(task: Task) -> None:
    model = tiny()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="has a loss that is no number"):
        list(evaluate(Sides(model, tiny_tokenizer()), task))


def test_a_choice_without_a_number_is_seen(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is not the right one."""
    task = Task(name="choices", items=[choices(1, 1)], scorer="choice")
    scored = [Scored([float("nan") if wrong else -1.0], greedy=False) for wrong in (True, False, False)]
    monkeypatch.setattr(Side, "choose", lambda *_: [scored])
    with pytest.raises(InputError, match="choice 1 has a loss that is no number"):
        list(evaluate(sides, task, ["base"]))
