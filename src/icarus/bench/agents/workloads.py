"""Workflows of agents as graphs of calls over token ids: pure data, the same for every system that is measured.

A call waits for the calls whose output its prompt holds (and for those in ``after``), so a workflow is a closed loop;
the load generator decides when a workflow starts. Outputs have fixed lengths. Texts are random token ids: what
a system does with a prompt depends on its length and on the prefixes that it shares, not on what it says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from icarus.bench.agents.settings import Settings

Tokens = tuple[int, ...]
Token = TypeVar("Token")


@dataclass(frozen=True)
class Output:
    """The place in a prompt where the tokens that an earlier call of the workflow generated stand."""

    call: int


Piece = Tokens | Output


@dataclass(frozen=True)
class Call:
    """One request of a workflow."""

    role: int  # which specialist; with N models it is model ``role % N``
    prompt: tuple[Piece, ...]
    output_tokens: int
    after: tuple[int, ...] = ()  # calls it waits for besides those in its prompt

    @property
    def waits_for(self) -> frozenset[int]:
        """Indices of the calls that must have ended."""
        return frozenset(self.after) | {piece.call for piece in self.prompt if isinstance(piece, Output)}


@dataclass(frozen=True)
class Workflow:
    """Calls in an order in which each stands behind those it waits for."""

    calls: tuple[Call, ...]

    def prompt(self, index: int, generated: Callable[[int], Sequence[Token]]) -> list[int | Token]:
        """The tokens of a call's prompt; ``generated`` gives those of an earlier call's output."""
        prompt: list[int | Token] = []
        for piece in self.calls[index].prompt:
            prompt += generated(piece.call) if isinstance(piece, Output) else piece
        return prompt

    def context(self, index: int) -> list[object]:
        """The tokens of a call's prompt and output; what models generate is told apart, but not known."""

        def generated(call: int) -> list[object]:
            return [(id(self), call, place) for place in range(self.calls[call].output_tokens)]

        return self.prompt(index, generated) + generated(index)

    @property
    def longest(self) -> int:
        """The most tokens that a call has in its context, its output among them."""
        return max(len(self.context(index)) for index in range(len(self.calls)))


@dataclass(frozen=True)
class Trajectory:
    """A recorded run: its question behind the instructions, and its steps: thought, action and observation."""

    prompt: Tokens
    steps: Sequence[tuple[Tokens, Tokens, Tokens]]


class Text:
    """Random token ids from the middle of a vocabulary, where no special tokens stand."""

    def __init__(self, vocabulary: int, seed: str) -> None:
        self._random = random.Random(seed)
        margin = min(1000, vocabulary // 8)
        self._first, self._last = margin, vocabulary - margin - 1

    def __call__(self, length: int) -> Tokens:
        return tuple(self._random.randint(self._first, self._last) for _ in range(length))


Maker = Callable[[Text, Tokens, Settings], Workflow]


def react(text: Text, system: Tokens, sizes: Settings) -> Workflow:
    """Specialist k adds to the trajectory, then an observation is appended, then k + 1 goes on."""
    prompt: tuple[Piece, ...] = (system + text(sizes.task_tokens),)
    calls = []
    for turn in range(sizes.turns):
        calls.append(Call(turn, prompt, sizes.output_tokens))
        prompt = (*prompt, Output(turn), text(sizes.observation_tokens))
    return Workflow(tuple(calls))


def reflexion(text: Text, system: Tokens, sizes: Settings) -> Workflow:
    """Attempts of three calls each: the retry sees the task and the reflections, and not the failed attempt."""
    task = system + text(sizes.task_tokens)
    memory: tuple[Piece, ...] = ()
    calls: list[Call] = []
    while len(calls) < sizes.turns:
        prompt: tuple[Piece, ...] = (task, *memory, text(sizes.observation_tokens))
        for _ in ("attempt", "evaluate", "reflect"):
            index = len(calls)
            calls.append(Call(index, prompt, sizes.output_tokens))
            prompt = (*prompt, Output(index), text(sizes.observation_tokens))
        memory = (*memory, Output(len(calls) - 1))
    return Workflow(tuple(calls[: sizes.turns]))


def plan_act_reflect(text: Text, system: Tokens, sizes: Settings) -> Workflow:
    """Pairs of calls (plan, act) and an observation behind each; the last call reflects."""
    output, observation = sizes.output_tokens, sizes.observation_tokens
    steps = [(text(output), text(output), text(observation)) for _ in range((sizes.turns - 1) // 2)]
    return replay(Trajectory(system + text(sizes.task_tokens), steps), sizes.output_tokens)


def replay(trajectory: Trajectory, reflection: int) -> Workflow:
    """A recorded run with the lengths of its thoughts and actions; role 0 plans, 1 acts, 2 reflects in the end.

    The roles move on by one with each step, so that a run of several steps meets every model.
    """
    prompt: tuple[Piece, ...] = (trajectory.prompt,)
    calls: list[Call] = []
    for number, (thought, action, observation) in enumerate(trajectory.steps):
        for place, recorded in enumerate((thought, action)):
            if recorded:
                calls.append(Call(2 * number + place, prompt, len(recorded)))
                prompt = (*prompt, Output(len(calls) - 1))
        prompt = (*prompt, observation)
    calls.append(Call(2 * len(trajectory.steps), prompt, reflection))
    return Workflow(tuple(calls))


def fan_out(text: Text, system: Tokens, sizes: Settings) -> Workflow:
    """One document, and a question of its own to each specialist."""
    document = system + text(sizes.task_tokens)
    questions = [text(sizes.observation_tokens) for _ in range(sizes.turns)]
    return Workflow(tuple(Call(turn, (document, q), sizes.output_tokens) for turn, q in enumerate(questions)))


def control(text: Text, system: Tokens, sizes: Settings) -> Workflow:
    """A chain in which every prompt is new from its first token."""
    return _chain(sizes.turns, lambda: text(sizes.task_tokens), sizes.output_tokens)


def writing(text: Text, system: Tokens, sizes: Settings) -> Workflow:
    """A chain of short prompts with long outputs, nothing shared."""
    return _chain(max(sizes.turns // 4, 1), lambda: text(sizes.observation_tokens), sizes.writing_tokens)


def _chain(length: int, prompt: Callable[[], Tokens], output: int) -> Workflow:
    return Workflow(tuple(Call(turn, (prompt(),), output, after=(turn - 1,) if turn else ()) for turn in range(length)))


MAKERS: dict[str, Maker] = {
    "react": react,
    "reflexion": reflexion,
    "plan-act-reflect": plan_act_reflect,
    "fan-out": fan_out,
    "control": control,
    "writing": writing,
}


def make(
    name: str,
    count: int,
    sizes: Settings,
    vocabulary: int,
    seed: str,
    trajectories: Sequence[Trajectory] = (),
) -> list[Workflow]:
    """``count`` workflows; the same for the same arguments. ``trajectories`` are for plan-act-reflect, in turn."""
    if name == "plan-act-reflect" and trajectories:
        first = random.Random(seed).randrange(len(trajectories))
        return [replay(trajectories[(first + i) % len(trajectories)], sizes.output_tokens) for i in range(count)]
    text = Text(vocabulary, f"{name} {seed}")
    system = text(sizes.system_tokens)
    return [MAKERS[name](text, system, sizes) for _ in range(count)]


def arrivals(count: int, window: float | None, seed: str) -> list[float]:
    """Seconds at which workflows start: a Poisson process of ``count`` arrivals in ``window`` seconds, or all at once.

    Given their number, arrivals of a Poisson process are uniform. Were the number drawn as well, a run's rate could be
    far from the one that it is named after.
    """
    if window is None:
        return [0.0] * count
    draw = random.Random(f"arrivals {seed}")
    return sorted(draw.uniform(0, window) for _ in range(count))


def working_set(workflows: Iterable[Workflow], models: int, block: int, *, shared: bool) -> int:
    """Tokens of K/V, in whole blocks, that a cache which never evicts holds at the end.

    ``shared``: one cache for all models; else one for each of the ``models``. Blocks are told apart by all tokens up
    to their end, as vLLM's prefix cache does.
    """
    blocks = set()
    for workflow in workflows:
        for index, call in enumerate(workflow.calls):
            owner = None if shared else call.role % models
            key, tokens = hash(owner), workflow.context(index)
            for start in range(0, len(tokens), block):
                key = hash((key, *tokens[start : start + block]))
                blocks.add(key)
    return len(blocks) * block
