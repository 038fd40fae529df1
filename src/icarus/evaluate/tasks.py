"""What is asked, and what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icarus.errors import InputError
from icarus.evaluate import sandbox
from icarus.evaluate.scorers import CHOICE, CODE, SCORERS, Scorer, misfit


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question.

    ``row`` has the form of training data, so that a model is asked as it was trained: ``prompt`` and ``completion``,
    texts or message lists, or ``prompt`` and ``completions`` for choices; with ``tools`` and ``chat_template_kwargs``
    for chats. The completion is the reference whose loss is taken.
    """

    name: str
    """By which results are matched, and which messages tell: such as a file and a line."""
    row: Mapping[str, Any]
    reference: Any
    """What the scorer compares an answer with; for choices the index of the right one."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Items and how they are answered.

    Raises:
        InputError: there is no such scorer, or it does not fit an item.
    """

    name: str
    items: Sequence[Item]
    scorer: str
    """A key of ``SCORERS``, or ``choice`` by log-likelihood."""
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    """Texts that end an answer; they are no part of it."""

    def __post_init__(self) -> None:
        known = sorted([*SCORERS, CHOICE])
        if self.scorer not in known:
            raise InputError(f"Task {self.name} has no known scorer {self.scorer!r}; take one of {', '.join(known)}.")
        if not self.items:
            raise InputError(f"Task {self.name} has no items; give at least one.")
        for item in self.items:
            self._check(item)

    def _check(self, item: Item) -> None:
        if not item.row.get("prompt"):
            raise InputError(f"{item.name} has no prompt; give one, or leave the item out.")
        choices = item.row.get("completions")
        if (choices is not None) != (self.scorer == CHOICE):
            needed = "choices (completions)" if self.scorer == CHOICE else "one completion"
            raise InputError(f"{item.name}: scorer {self.scorer!r} needs {needed}; give the task another scorer.")
        if item.reference is None:
            raise InputError(f"{item.name} has no reference to score answers by; give one, or leave the item out.")
        right = item.reference
        if choices is None and (wanted := misfit(self.scorer, right)):
            raise InputError(f"{item.name}: scorer {self.scorer!r} needs {wanted} as reference, not {right!r:.80}.")
        if choices is not None:
            check_choice(item.name, right, choices)

    @property
    def generates(self) -> bool:
        """Whether answers are generated; choices are compared by their likelihood alone."""
        return self.scorer != CHOICE

    def check_confirmed(self, *, confirm_run_unsafe_code: bool) -> None:
        """Refuse to run what a model wrote unless somebody has said so, and it can be done in a sandbox.

        Raises:
            InputError: it may not or cannot be run; the message names the task.
        """
        if self.scorer != CODE:
            return
        if not confirm_run_unsafe_code:
            raise InputError(
                f"Task {self.name} runs programs that a model wrote; allow it with --confirm-run-unsafe-code, or leave "
                "the task out."
            )
        sandbox.check()

    def score(self, answer: str, item: Item) -> float:
        """Of a generated answer, from 0 to 1."""
        scorer: Scorer = SCORERS[self.scorer]
        return scorer(answer, item.reference)


def check_choice(name: str, right: Any, choices: Sequence[Any]) -> None:
    """Refuse what is no index of one of the choices.

    Raises:
        InputError: it names the item.
    """
    if type(right) is not int or not 0 <= right < len(choices):
        raise InputError(f"{name}: the right choice is {right!r}; give its index, from 0 to {len(choices) - 1}.")
