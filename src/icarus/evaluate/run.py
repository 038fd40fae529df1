"""Each side over each item: the loss of the reference, the answer, the score."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icarus.chat_template import Codec
from icarus.errors import InputError
from icarus.evaluate.generated import Answer
from icarus.evaluate.progress import Progress
from icarus.evaluate.sides import Scored, Side, Sides, TokenRow
from icarus.evaluate.tasks import Item, Task
from icarus.streams import IGNORED
from icarus.train.data import separate, tokenize


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One side's result on one item."""

    task: str
    side: str
    item: str
    score: float
    loss: float
    """Nats per token of the reference; of choices, the right one."""
    tokens: int
    """Tokens of the reference, its end token included where training has one."""
    text: str
    """The generated answer, or the most likely choice."""
    generated_tokens: int
    drift: float | None
    """KL divergence from the base model in nats per generated token; None where nothing is generated."""


@dataclass(frozen=True)
class _Asked:
    item: Item
    rows: list[TokenRow]  # the reference, or all choices


def evaluate(
    sides: Sides,
    task: Task,
    names: Sequence[str] | None = None,
    *,
    batch_size: int = 8,
    done: Sequence[tuple[str, str]] = (),
    confirm_run_unsafe_code: bool = False,
    lines: bool = False,
) -> Iterator[Outcome]:
    """Results of all sides (or those of ``names``), one side after another, as batches are finished.

    Items are sorted by length, the longest first, so that a batch that does not fit into memory is seen at once.

    Args:
        sides: who answers.
        task: what is asked.
        names: of sides, in the order in which they answer.
        batch_size: items in one pass; an item's choices follow its prompt one by one.
        done: (side, item) that are known already.
        confirm_run_unsafe_code: whether programs that a model wrote may run (scorer ``code``), in a sandbox.
        lines: whether progress is printed where there is no terminal for a bar.

    Raises:
        InputError: an item has no tokens to predict, or does not fit into the model; or programs would be run and may
            not, or cannot be in a sandbox. Before anything runs.
    """
    task.check_confirmed(confirm_run_unsafe_code=confirm_run_unsafe_code)
    chosen = list(sides.kinds) if names is None else list(names)
    asked = [_asked(item, sides.codec) for item in task.items]
    asked.sort(key=lambda one: max(len(row.input_ids) for row in one.rows), reverse=True)
    finished = set(done)
    with Progress(task.name, len(chosen) * len(asked), lines=lines) as progress:
        for name in chosen:
            left = [one for one in asked if (name, one.item.name) not in finished]
            progress.start(name)
            progress.update(len(asked) - len(left))
            with sides.side(name) as side:
                for one in left:
                    _check_length(one, side)
                for start in range(0, len(left), batch_size):
                    batch = left[start : start + batch_size]
                    yield from _outcomes(name, side, task, batch)
                    progress.update(len(batch))


def digest(task: Task, codec: Codec) -> str:
    """A hash of all that results of a task depend on, besides the model: token ids, labels, references, settings."""
    whole = hashlib.sha256(repr((task.scorer, task.max_new_tokens, tuple(task.stop))).encode())
    for item in task.items:
        rows = [(list(row.input_ids), list(row.labels)) for row in _asked(item, codec).rows]
        whole.update(repr((item.name, item.reference, rows)).encode())
    return whole.hexdigest()


def _asked(item: Item, codec: Codec) -> _Asked:
    """The tokens of an item are those of a training row, cut where the first answer begins."""
    columns = [tokenize(row, codec, None) for row in separate(item.row)]
    rows = [TokenRow(c["input_ids"], c["labels"]) for c in columns]
    if not all(any(label != IGNORED for label in row.labels) and row.labels[0] == IGNORED for row in rows):
        raise InputError(f"{item.name}: the completion has no tokens behind the prompt; give one that has.")
    return _Asked(item, rows)


def _check_length(one: _Asked, side: Side) -> None:
    longest = max(len(row.input_ids) for row in one.rows)
    if side.max_length and longest > side.max_length:
        raise InputError(
            f"{one.item.name} has {longest} tokens and this model takes {side.max_length}; leave the item out."
        )


def _outcomes(name: str, side: Side, task: Task, batch: Sequence[_Asked]) -> Iterator[Outcome]:
    results = _generated(side, task, batch) if task.generates else _chosen(side, batch)
    for one, (score, right, text, answer) in zip(batch, results, strict=True):
        if math.isnan(_loss(right) + (answer.drift if answer else 0.0)):
            raise _no_number(one.item)
        yield Outcome(
            task=task.name,
            side=name,
            item=one.item.name,
            score=score,
            loss=_loss(right),
            tokens=len(right.log_probabilities),
            text=text,
            generated_tokens=len(answer.token_ids) if answer else 0,
            drift=answer.drift if answer else None,
        )


_Result = tuple[float, Scored, str, Answer | None]
"""Score, the reference's log-probabilities, text, what was generated."""


def _generated(side: Side, task: Task, batch: Sequence[_Asked]) -> Iterator[_Result]:
    answers = side.answer([one.rows[0] for one in batch], max_new_tokens=task.max_new_tokens, stop=task.stop)
    for one, (right, answer) in zip(batch, answers, strict=True):
        yield task.score(answer.text, one.item), right, answer.text, answer


def _chosen(side: Side, batch: Sequence[_Asked]) -> Iterator[_Result]:
    for one, own in zip(batch, side.choose([one.rows for one in batch]), strict=True):
        if any(math.isnan(_loss(scored)) for scored in own):
            raise _no_number(one.item)
        best = max(range(len(own)), key=lambda i: sum(own[i].log_probabilities))
        yield float(best == one.item.reference), own[one.item.reference], _choice(one.item, best), None


def _no_number(item: Item) -> InputError:
    return InputError(f"{item.name} has a loss that is no number (NaN); check the weights of this side and the dtype.")


def _loss(scored: Scored) -> float:
    return -sum(scored.log_probabilities) / len(scored.log_probabilities)


def _choice(item: Item, index: int) -> str:
    choice = item.row["completions"][index]
    return choice if isinstance(choice, str) else "".join(message["content"] or "" for message in choice)
