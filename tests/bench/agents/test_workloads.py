"""Workflows of calls: the same for everybody, closed loops, and the K/V that they need."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icarus.bench.agents import trajectories, workloads
from icarus.bench.agents.settings import Settings
from icarus.bench.agents.workloads import MAKERS, Call, Output, Workflow
from icarus.errors import InputError

SIZES = st.builds(
    Settings,
    system_tokens=st.integers(0, 9),
    task_tokens=st.integers(10, 30),  # so that no two are equal by chance
    turns=st.integers(1, 9),
    output_tokens=st.integers(1, 5),
    observation_tokens=st.integers(10, 20),
    writing_tokens=st.integers(1, 9),
)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(MAKERS)), sizes=SIZES, seed=st.integers(0, 5))
def test_workflows_are_a_function_of_their_arguments(name: str, sizes: Settings, seed: int) -> None:
    one, again = (workloads.make(name, 2, sizes, 64, str(seed)) for _ in range(2))
    assert one == again
    assert one[0] != one[1]
    assert one != workloads.make(name, 2, sizes, 64, f"{seed} else")
    for workflow in one:
        for index, call in enumerate(workflow.calls):
            assert all(earlier < index for earlier in call.waits_for)
            ids = [token for piece in call.prompt if not isinstance(piece, Output) for token in piece]
            assert all(8 <= token < 56 for token in ids)  # an eighth of the vocabulary is left alone on either side
            assert len(workflow.context(index)) > call.output_tokens


def prompts(workflow: Workflow) -> list[int]:
    """The lengths of all prompts."""
    return [len(workflow.context(index)) - call.output_tokens for index, call in enumerate(workflow.calls)]


def test_react_grows_one_trajectory_and_changes_specialists() -> None:
    (workflow,) = workloads.make(
        "react", 1, Settings(system_tokens=2, task_tokens=3, turns=3, output_tokens=4, observation_tokens=5), 64, "0"
    )
    assert [call.role for call in workflow.calls] == [0, 1, 2]
    assert prompts(workflow) == [5, 14, 23]
    assert workflow.calls[2].prompt[:3] == workflow.calls[1].prompt
    assert [sorted(call.waits_for) for call in workflow.calls] == [[], [0], [0, 1]]
    assert workflow.longest == 27


def test_reflexion_tries_again_with_the_reflections_and_without_the_attempt() -> None:
    (workflow,) = workloads.make(
        "reflexion",
        1,
        Settings(system_tokens=2, task_tokens=3, turns=7, output_tokens=4, observation_tokens=5),
        64,
        "0",
    )
    attempts = [workflow.calls[index] for index in (0, 3, 6)]
    task = attempts[0].prompt[0]
    assert [call.prompt[:-1] for call in attempts] == [(task,), (task, Output(2)), (task, Output(2), Output(5))]


def test_fan_out_waits_for_nobody_and_control_shares_nothing() -> None:
    sizes = Settings(system_tokens=2, task_tokens=30, turns=4, output_tokens=2, observation_tokens=5)
    (fan,) = workloads.make("fan-out", 1, sizes, 4096, "0")
    assert all(not call.waits_for for call in fan.calls)
    assert len({call.prompt[0] for call in fan.calls}) == 1
    (control,) = workloads.make("control", 1, sizes, 4096, "0")
    assert [sorted(call.waits_for) for call in control.calls] == [[], [0], [1], [2]]
    assert len({call.prompt[0][:4] for call in control.calls if not isinstance(call.prompt[0], Output)}) == 4


def test_arrivals_are_poisson_and_seeded() -> None:
    times = workloads.arrivals(4000, 2000.0, "0")
    assert times == workloads.arrivals(4000, 2000.0, "0") == sorted(times)
    assert 0 <= times[0] < times[-1] <= 2000
    gaps = [b - a for a, b in pairwise(times)]
    assert sum(gap > 0.5 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # exp(-1) beyond the mean
    assert workloads.arrivals(3, None, "0") == [0, 0, 0]


def test_working_set_by_hand() -> None:
    first: tuple[int, ...] = tuple(range(10))
    workflow = Workflow((Call(0, (first,), 2), Call(1, (first, Output(0), (77, 78, 79)), 3)))
    # Blocks of 4: the first context has 12 tokens, the second 12 + 3 + 3 = 18 and so 5 blocks.
    assert workloads.working_set([workflow], 2, 4, shared=True) == 5 * 4
    assert workloads.working_set([workflow], 2, 4, shared=False) == (3 + 5) * 4
    assert workloads.working_set([workflow], 1, 4, shared=False) == 5 * 4
    other = Workflow((Call(0, (first[:8],), 4),))  # its first two blocks are those of the other workflow
    assert workloads.working_set([workflow, other], 1, 4, shared=True) == (5 + 1) * 4


RUN = {
    "system": "You act.",
    "question": "Who?",
    "steps": [
        {"thought": "think a", "action": "Search", "argument": "x y", "observation": "found it"},
        {"thought": "", "action": "Finish", "argument": "he"},
    ],
}


def words(text: str) -> tuple[int, ...]:
    """A token for each word."""
    return tuple(len(word) for word in text.split())


@pytest.mark.parametrize("name", ["runs.jsonl", "runs.jsonl.gz"])
def test_a_recorded_run_keeps_its_lengths(tmp_path: Path, name: str) -> None:
    text = json.dumps(RUN) + "\n\n" + json.dumps({**RUN, "question": "w " * 99}) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    (trajectory,) = trajectories.read(tmp_path / name, words, limit=9, longest=26, reflection=7)
    workflow = workloads.replay(trajectory, reflection=7)
    assert [(call.role, call.output_tokens) for call in workflow.calls] == [(0, 2), (1, 3), (3, 2), (4, 7)]
    assert prompts(workflow) == [3, 5, 10, 12]
    assert workloads.make("plan-act-reflect", 2, Settings(output_tokens=7), 64, "0", [trajectory]) == [workflow] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "line 1: no run"),
        ("{}\n", "line 1: no run.*steps"),
        (json.dumps({**RUN, "steps": []}), "no run with steps of up to 26"),
        ("{", "line 1"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_of_trajectories_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "runs.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        trajectories.read(file, words, limit=9, longest=26, reflection=7)
    assert "runs.jsonl" in str(error.value)
