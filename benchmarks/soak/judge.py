"""Whether what an engine answered is what the reference says.

* A token is right if it is the reference's greedy one behind the same tokens, or if its logit lies within ``TIE`` of
  the best one: two sums in different order may then decide otherwise. Tokens behind it are compared behind *it*.
* An adapter that is replaced while a request runs is replaced between two steps. So each token is of one version of
  those that were in force while the request was in the engine, and never of an earlier one than the token before it.
  A token that was handed out by itself is of the version in force at that time; with asynchronous scheduling, where a
  step or two may be under way, of that at the time of the token before it, or two before.
* A score (``prompt_logprobs``) is right within ``SCORE`` for one of those versions: a prompt that is preempted is
  scored anew.
* Each request is answered to its last token or cancelled, and nothing comes after it was cancelled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks.soak.mix import BASE

TIE = 1e-4
"""Between the reference's two best logits."""

SCORE = 1e-3
"""Between two log-probabilities."""


class Right(Protocol):
    """What is right; ``reference.Reference``, or what a test puts in its place."""

    def tokens(self, speaker: tuple[str, int], prompt: list[int], likely: list[int]) -> list[int]: ...
    def scores(self, speaker: tuple[str, int], prompt: list[int]) -> list[float]: ...
    def gap(self, speaker: tuple[str, int], prompt: list[int], token: int) -> float: ...


class Judge:
    """Judges records (``engine_job.Record`` as JSON), and counts what it saw."""

    def __init__(self, right: Right, lag: int = 0) -> None:
        """
        Args:
            right: the reference.
            lag: how many tokens of a stream may be under way when an adapter is replaced; 0 where each step is
                finished before the next operation.
        """
        self._right, self._lag = right, lag
        self.counts: Counter[str] = Counter()

    def fault(self, record: Mapping[str, Any]) -> str:
        """What is wrong with one request; empty if nothing is."""
        request = record["request"]
        if record["late"]:
            return "tokens came after it was cancelled"
        if not record["cancelled"]:
            if not record["finished"]:
                return f"lost: {len(record['tokens'])} tokens of {request['max_tokens']} came, and no end"
            if len(record["tokens"]) != request["max_tokens"]:
                return f"{len(record['tokens'])} tokens and not {request['max_tokens']} ({record['finished']})"
        return self._tokens(record) or self._scores(record)

    def _tokens(self, record: Mapping[str, Any]) -> str:
        model, prompt, tokens, versions = (
            record["request"]["model"],
            record["prompt"],
            record["tokens"],
            record["versions"],
        )
        done = at = 0  # ``at``: the version in force, as a place in ``versions``
        while done < len(tokens):
            at = max(at, self._least(record, done))
            until = next((index for index in range(done, len(tokens)) if self._least(record, index) > at), len(tokens))
            wanted = self._right.tokens((model, versions[at]), [*prompt, *tokens[:done]], tokens[done:until])
            agreed = agreement(tokens[done:until], wanted)
            if any(last < at for last in record["at"][done : done + agreed]):
                return f"a token is of a version that was loaded after it was handed out ({_named(model, versions)})"
            done += agreed
            self.counts["tokens"] += agreed
            if done == until:
                continue
            if self._right.gap((model, versions[at]), [*prompt, *tokens[:done]], tokens[done]) <= TIE:
                done += 1
                self.counts["tokens"] += 1
                self.counts["ties"] += 1
            elif at + 1 < len(versions):
                at += 1
                self.counts["crossings"] += 1
            else:
                return f"token {done} is {tokens[done]} and not {wanted[agreed]} ({_named(model, versions)})"
        return ""

    def _least(self, record: Mapping[str, Any], index: int) -> int:
        """The oldest version that a token may be of, as a place in ``versions``."""
        handed = record["at"]
        if not handed or index < self._lag:
            return 0
        return int(handed[index - self._lag])

    def _scores(self, record: Mapping[str, Any]) -> str:
        if record["scores"] is None or len(record["prompt"]) < 2:
            return ""
        model, versions = record["request"]["model"], record["versions"]
        known = [self._right.scores((model, version), record["prompt"]) for version in dict.fromkeys(versions)]
        for place, got in enumerate(record["scores"]):
            self.counts["scores"] += 1
            if all(abs(got - scores[place]) > SCORE for scores in known):
                return f"score {place + 1} is {got:.4f} and not {known[0][place]:.4f} ({_named(model, versions)})"
        return ""


def agreement(got: list[int], wanted: list[int]) -> int:
    """How many of the tokens that came begin what is wanted."""
    return next((index for index, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), len(got))


def _named(model: str, versions: list[int]) -> str:
    return model if model == BASE else f"{model}, versions {versions}"
