"""The soak: that its judge sees what is wrong, that its mix has what it promises, and a short run of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from arithmetic import TIED, Arithmetic
from benchmarks.soak import shop
from benchmarks.soak.judge import Judge
from benchmarks.soak.load import Soak, faults_of, literal, smallest
from benchmarks.soak.mix import Mix, engine_options
from strict_skips import needs_vllm

RIGHT = Arithmetic()
PROMPT = [3, 1, 4]


def record(tokens: list[int], *, versions: tuple[int, ...] = (0,), at: list[int] | None = None, **more: Any) -> Any:
    request = {"number": 1, "model": "sql", "max_tokens": len(tokens), "follows": None}
    told = {"request": request, "prompt": PROMPT, "versions": list(versions), "tokens": tokens, "at": at or []}
    return {**told, "scores": None, "cached": 0, "finished": "length", "cancelled": False, "late": False, **more}


def answer(version: int, count: int, behind: list[int] | None = None) -> list[int]:
    return RIGHT.answer(("sql", version), [*PROMPT, *(behind or [])], count)


def fault(told: Any, lag: int = 0) -> str:
    return Judge(RIGHT, lag).fault(told)


# ---------------------------------------------------------------------------------------------- the judge


def test_right_tokens_are_right() -> None:
    judge = Judge(RIGHT)
    assert judge.fault(record(answer(0, 8))) == ""
    assert judge.counts["tokens"] == 8


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_wrong_token_is_found_wherever_it_is(place: int) -> None:
    tokens = answer(0, 8)
    tokens[place] = (tokens[place] + 1) % 90
    assert f"token {place} is" in fault(record(tokens))


def test_a_tie_counts_as_right_and_what_is_behind_it_is_compared_behind_it() -> None:
    tokens = [*answer(0, 3), TIED]
    right = tokens + answer(0, 3, tokens)
    judge = Judge(RIGHT)
    assert judge.fault(record(right)) == ""
    assert judge.counts["ties"] == 1
    assert "token 4" in fault(record(tokens + answer(0, 7)[4:]))


def test_a_lost_request_is_found() -> None:
    assert "lost" in fault(record(answer(0, 8), finished=""))
    assert "and not 9" in fault(record(answer(0, 8)) | {"request": {"max_tokens": 9, "model": "sql"}})
    assert "after it was cancelled" in fault(record(answer(0, 8), cancelled=True, late=True))


def test_what_a_cancelled_request_got_is_compared() -> None:
    assert fault(record(answer(0, 3), cancelled=True, finished="")) == ""
    assert "token 0" in fault(record([91, 5], cancelled=True, finished=""))


def crossing(first: int = 3) -> list[int]:
    """The first tokens of version 0, the others of version 1."""
    tokens = answer(0, first)
    return tokens + answer(1, 8 - first, tokens)


def test_a_swap_between_two_steps() -> None:
    """Tokens that were handed out after it are of the new version, the others of the old one."""
    told = [0, 0, 0, 1, 1, 1, 1, 1]
    assert fault(record(crossing(), versions=(0, 1), at=told)) == ""
    assert "is" in fault(record(crossing(4), versions=(0, 1), at=told)), "a token of the old version after the swap"
    assert "after it was handed out" in fault(record(crossing(2), versions=(0, 1), at=told))
    assert fault(record(answer(0, 8), versions=(0, 1), at=told)), "the swap never came"


def test_a_step_that_was_under_way_at_the_swap() -> None:
    told = [0, 0, 0, 1, 1, 1, 1, 1]
    assert fault(record(crossing(4), versions=(0, 1), at=told), lag=2) == ""
    assert fault(record(crossing(5), versions=(0, 1), at=told), lag=2) == ""
    assert fault(record(crossing(6), versions=(0, 1), at=told), lag=2)


def test_an_answer_in_one_piece_may_cross_a_swap_once() -> None:
    assert fault(record(crossing(), versions=(0, 1))) == ""
    assert fault(record(answer(1, 8), versions=(0, 1))) == ""
    assert "token 3" in fault(record(crossing(), versions=(1, 0))) or "token" in fault(
        record(crossing(), versions=(1, 0))
    )
    back = crossing()[:5]
    back += answer(0, 3, back)
    assert fault(record(back, versions=(0, 1)))
    assert fault(record(back, versions=(0, 1, 0))) == ""


def test_scores_are_of_one_version_each() -> None:
    assert fault(record(answer(0, 2), scores=[-1.0, -4.0])) == ""
    assert "score 2" in fault(record(answer(0, 2), scores=[-1.0, -4.01]))
    assert fault(record(answer(0, 2), versions=(0, 1), scores=[-1.0, -5.0])) == ""


def test_what_is_left_in_an_engine_is_a_fault() -> None:
    result = {"error": "", "records": [], "summary": {"blocks_in_use": 2, "requests_left": 0}}
    assert [f.what for f in faults_of(result, Judge(RIGHT))] == ["blocks_in_use is 2 when all is done"]
    dead = {"error": "Traceback", "records": [record([], finished="")], "summary": {}}
    assert [f.what for f in faults_of(dead, Judge(RIGHT))] == ["Traceback"]


# ---------------------------------------------------------------------------------------------- the mix


def mix(seed: str) -> Mix:
    return Mix(seed, list(shop.SPECIALISTS), list(shop.CONVENTIONAL), draw=shop.any_tokens)


def test_a_fifth_of_each_kind_and_swaps_beside_them() -> None:
    operations = mix("a").operations(5000)
    assert operations == mix("a").operations(5000) != mix("b").operations(5000)
    requests = [operation["ask"] for operation in operations if "ask" in operation]
    kinds = Counter("base" if r["model"] == "base" else r["model"] in shop.SPECIALISTS for r in requests)
    kinds.update(kind for r in requests for kind in ("streamed", "scored") if r[kind])
    kinds.update("following" if r["follows"] is not None else "other" for r in requests)
    assert min(kinds[kind] for kind in ("base", True, False, "streamed", "scored", "following")) > 1000
    done = Counter(action for operation in operations for action in operation)
    assert done["swap"] > 500
    assert done["cancel"] > 250
    assert min(done["renew"], done["reload"], done["quiet"]) > 50


def test_prompts_fit_the_context() -> None:
    operations = mix("c").operations(3000)
    lengths: dict[int, int] = {}
    for request in (operation["ask"] for operation in operations if "ask" in operation):
        before = lengths.get(request["follows"], 0)
        lengths[request["number"]] = before + len(request["prompt"]) + request["max_tokens"]
    assert max(lengths.values()) < 256


def test_engines_differ_and_can_hold_a_request() -> None:
    options = [engine_options(str(seed)) for seed in range(50)]
    assert len({str(sorted(o.items(), key=str)) for o in options}) > 40
    assert all(o["num_gpu_blocks_override"] > 256 // 32 for o in options)
    assert all(o["max_num_batched_tokens"] >= o["max_num_seqs"] for o in options)
    assert all(o["max_cpu_loras"] >= o["max_loras"] for o in options)


def test_the_smallest_job_has_only_what_it_takes() -> None:
    operations = mix("d").operations(40)
    culprits = [7, 23]

    def fails(job: Any) -> bool:
        asked = [operation["ask"]["number"] for operation in job["operations"] if "ask" in operation]
        return all(number in asked for number in culprits)

    least = smallest({"operations": operations}, fails, 200)["operations"]
    assert [operation["ask"]["number"] for operation in least] == culprits


def test_a_literal_job_needs_no_answer_of_another() -> None:
    operations = [
        {"ask": {"number": 0, "prompt": [1], "follows": None}},
        {"ask": {"number": 1, "prompt": [2], "follows": 0}},
    ]
    result = {"records": [{"request": {"number": 1}, "prompt": [1, 5, 2]}]}
    job = literal({"operations": operations}, result)
    assert job["operations"][1] == {"ask": {"number": 1, "prompt": [1, 5, 2], "follows": None}}


def test_an_interrupted_load_goes_on_from_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def round_(self: Soak, seed: str, requests: int) -> dict[str, Any]:
        asked.append((seed, requests))
        counts = {"requests": requests, "swaps": 5}
        return {"seed": seed, "counts": counts, "judged": {"tokens": 7}, "seconds": 2, "faults": []}

    monkeypatch.setattr(Soak, "round", round_)
    soak = Soak(shop=shop.Shop(base=tmp_path, specialists={}, conventional={}), right=RIGHT, folder=tmp_path)
    kept: list[dict[str, Any]] = []
    whole = soak.run(3, 900, 12, keep=kept.append)
    assert asked == [("3/0", 400), ("3/1", 400), ("3/2", 100)]
    assert [report["counts"]["requests"] for report in kept] == [400, 800, 900]
    assert whole == kept[-1]
    assert soak.run(3, 900, 12, before=kept[0]["rounds"]) == whole
    assert asked[3:] == asked[1:3]


def test_the_reference_answers_alike_whatever_is_likely(tmp_path: Path) -> None:
    from benchmarks.soak.reference import Reference

    stock, prompt = shop.tiny(tmp_path), [*range(10, 40)]
    for speaker in (("plain", 1), ("sql", 2), ("base", 0)):
        right = Reference(stock).tokens(speaker, prompt, [5] * 12)
        assert len(set(right)) > 3
        for likely in (right, [*right[:7], 5, *right[8:]], [5] * 12):
            again = Reference(stock)
            assert again.tokens(speaker, prompt, likely[:3]) == right[:3]
            assert again.tokens(speaker, prompt, likely) == right


# ---------------------------------------------------------------------------------------------- a short run


@pytest.mark.engine
@needs_vllm
def test_a_short_soak(tmp_path: Path) -> None:
    """One engine with too little of everything, with eighty requests and what goes on beside them."""
    from benchmarks.soak.reference import Reference

    stock = shop.tiny(tmp_path / "stock")
    done = Soak(shop=stock, right=Reference(stock), folder=tmp_path, shrinking=0).round("short/6", 80)
    assert done["faults"] == []
    assert done["counts"]["requests"] == 80
    wanted = ("swaps", "preemptions", "cancelled", "chunked", "scored")
    assert min(done["counts"][count] for count in wanted) > 0
    assert done["judged"]["tokens"] > 500
