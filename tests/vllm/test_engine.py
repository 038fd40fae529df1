"""vLLM with the plugin against the in-process reference and against stock vLLM: greedy tokens in float32."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engines import BLOCK, LENGTHS, NEW, SHAPE, Asked, Reply, Shop, Step, ask, of, prompts
from icarus.vllm import abilities
from icarus.vllm.engine import limits
from specimens import tensors
from strict_skips import needs_vllm
from tiny_models import tiny, tokens

pytestmark = [pytest.mark.engine, needs_vllm]


SHARED = tokens(97, seed=300).tolist()
ALONE: list[Asked] = [(model, prompt) for prompt in prompts(0) for model in ("base", "sql", "chat")]
MIXED: list[Asked] = [(model, prompt) for prompt in prompts(100) for model in ("base", "sql", "chat", "plain")]
SCORED: list[Asked] = [(model, prompt) for prompt in prompts(400) for model in ("base", "sql", "chat", "plain")]
WIDE: list[Asked] = [(model, prompt) for prompt in prompts(500) for model in ("base", "wide", "plain")]

# A few tests have engines with options of their own. All others look at what one engine of each kind answered: an
# engine takes longer to start than to answer everything that is asked here.


@pytest.fixture(scope="module")
def stock(shop: Shop) -> dict[str, Any]:
    """Stock vLLM; of ICaRus adapters it makes plain LoRA, which is wrong.

    One slot stays empty: on CPUs stock vLLM gives rows of the base model the adapter in the last one.
    """
    steps = {
        "mixed": [ask(*MIXED)],
        "in turn": in_turn(),
        "wide": [ask(("wide", SHARED)), ask(*WIDE)],
        "odd": [ask(("odd", SHARED))],
    }
    return shop.serve_parts(steps, plugin=False, max_loras=5)


def in_turn() -> list[Step]:
    """What both engines do alike: prompts that repeat, with each other's beginnings."""
    models = ("plain", "base", "plain", "base", "wide", "plain")
    lengths = (97, 64, 130, 97, 64, 97)
    whole = tokens(130, seed=600).tolist()
    return [ask((model, whole[:length])) for model, length in zip(models, lengths, strict=True)]


def scored_beside_a_head() -> Step:
    step = ask(("wide", SHARED), ("base", SHARED[:3]))
    step["ask"][1]["sampling"] = {"prompt_logprobs": 0, "max_tokens": 1}
    return step


def check(shop: Shop, stock: dict[str, Any], replies: list[Reply]) -> None:
    """The mixed batch has the reference's tokens, and stock vLLM's for what stock vLLM can serve."""
    for (model, prompt), got, plain in zip(MIXED, of(replies), of(stock["mixed"][0]), strict=True):
        wanted = plain if model in ("base", "plain") else shop.reference(model, prompt)
        assert got == wanted, (model, len(prompt))


def all_steps(shop: Shop) -> dict[str, list[Step]]:
    """What an engine with default options is asked."""
    once = {"prompt": tokens(97, seed=800).tolist(), "sampling": {"max_tokens": 1}}
    return {
        "alone": [ask(asked) for asked in ALONE],
        "mixed": [ask(*MIXED)],
        "in turn": [ask((model, SHARED)) for model in ("sql", "chat", "base", "plain", "plain")],
        "scored": [ask(*SCORED, prompt_logprobs=0)],
        "sampled": [ask(*SCORED, logprobs=0)],
        "seeded": [ask((model, SHARED), n=3, seed=5, temperature=1.0) for model in ("sql", "sql", "chat")],
        "as stock": in_turn(),
        "wide": [ask(*WIDE)],
        "scored beside a head": [scored_beside_a_head()],
        "same blocks": [{"written": [{"model": model, **once} for model in ("sql", "chat", "base", "plain")]}],
        "bad": [ask(("foreign", SHARED)), {"load": {"name": "foreign"}}, ask(("base", SHARED))],
        "poisoned": [ask(("poisoned", SHARED)), {"load": {"name": "poisoned"}}, ask(("base", SHARED))],
        "patterns": [ask(("uneven", SHARED), ("base", SHARED)), ask(("odd", SHARED), ("base", SHARED))],
        "reload": [
            {"load": {"name": "sql", "lora_path": str(shop.folder / "chat"), "load_inplace": True}},
            ask(("sql", SHARED)),
            {"load": {"name": "sql", "lora_path": str(shop.folder / "plain"), "load_inplace": True}},
            ask(("sql", SHARED)),
        ],
        "mutant": [{"sample scheduled rows": None}, ask(*((model, SHARED) for model in ("chat", "base", "plain")))],
    }


@pytest.fixture(scope="module")
def served(either: Shop) -> dict[str, Any]:
    """vLLM with the plugin, on either model runner."""
    return either.serve_parts(all_steps(either))


@pytest.fixture(scope="module")
def ranks(either: Shop) -> dict[str, Any]:
    """vLLM with the plugin on two tensor-parallel ranks, of which some cannot copy an adapter for a while."""
    reload = {"load": {"name": "sql", "lora_path": str(either.folder / "chat"), "load_inplace": True}}
    asked, files = ask(("sql", SHARED)), {"files": None}
    steps = {
        "mixed": [ask(*MIXED)],
        "before": [asked, files],
        "refused": [step for ranks in ([1], [0], [0, 1], [1]) for step in ({"spoil": ranks}, reload, asked, files)],
        "after": [{"spoil": []}, reload, asked, files],
    }
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    return either.serve_parts(steps, variables={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, **options)


def test_alone(shop: Shop, served: Any) -> None:
    for (model, prompt), [reply] in zip(ALONE, served["alone"], strict=True):
        assert reply["tokens"] == shop.reference(model, prompt), (model, len(prompt))


def test_in_a_mixed_batch(shop: Shop, served: Any, stock: Any) -> None:
    check(shop, stock, served["mixed"][0])


def test_base_and_conventional_adapters_find_in_the_cache_what_they_find_in_stock_vllm(served: Any, stock: Any) -> None:
    parts = served["as stock"], stock["in turn"]
    ours, theirs = ([(r["tokens"], r["cached"]) for [r] in replies] for replies in parts)
    assert ours == theirs
    assert [cached for _, cached in ours] == [0, 0, 96, 64, 0, 96]


def test_the_models_differ_and_as_plain_lora_they_are_wrong(shop: Shop, stock: Any) -> None:
    """Without this the tests here could not fail."""
    answers = {(model, len(prompt)): got for (model, prompt), got in zip(MIXED, of(stock["mixed"][0]), strict=True)}
    assert len({tuple(answers[model, max(LENGTHS)]) for model in ("base", "sql", "chat", "plain")}) == 4
    asked = [(model, prompt, got) for (model, prompt), got in zip(MIXED, of(stock["mixed"][0]), strict=True)]
    wrong = [model for model, prompt, got in asked if model in ("sql", "chat") and got != shop.reference(model, prompt)]
    assert len(wrong) > len(LENGTHS)


def test_the_cache_is_shared_by_those_who_may(shop: Shop, served: Any) -> None:
    whole_blocks = len(SHARED) // BLOCK * BLOCK
    cached = [reply["cached"] for [reply] in served["in turn"]]
    assert cached == [0, whole_blocks, whole_blocks, 0, whole_blocks], "sql, chat, base; plain has a cache of its own"
    for model, [reply] in zip(("sql", "chat", "base"), served["in turn"], strict=False):
        assert reply["tokens"] == shop.reference(model, SHARED)


def test_prompt_logprobs_are_the_specialists(shop: Shop, served: Any) -> None:
    assert sum(len(prompt) for _, prompt in SCORED) > 2 * limits.MAX_SCORED_ROWS, "more than fits one step"
    for (model, prompt), reply in zip(SCORED, served["scored"][0], strict=True):
        assert len(reply["scored"]) == len(prompt) - 1
        if model != "plain":
            assert reply["tokens"] == shop.reference(model, prompt), (model, len(prompt))
            assert reply["scored"] == pytest.approx(shop.scores(model, prompt), abs=1e-3)


def test_logprobs_of_generated_tokens_are_the_specialists(shop: Shop, served: Any) -> None:
    for (model, prompt), reply in zip(SCORED, served["sampled"][0], strict=True):
        if model != "plain":
            scores = shop.scores(model, [*prompt, *reply["tokens"]])[-NEW:]
            assert reply["sampled"] == pytest.approx(scores, abs=1e-3), (model, len(prompt))


def test_several_choices_and_seeds(served: Any) -> None:
    [once], [again], [other] = served["seeded"]
    assert len({tuple(choice) for choice in once["choices"]}) == 3
    assert once["choices"] == again["choices"] != other["choices"]


def test_an_adapter_of_another_base_is_refused_and_the_engine_lives(shop: Shop, served: Any) -> None:
    asked, loaded, [afterwards] = served["bad"]
    assert "base" in asked["error"]
    assert "base" in loaded["error"]
    assert afterwards["tokens"] == shop.reference("base", SHARED)


def test_a_poisoned_conventional_adapter_is_refused_and_the_engine_lives(shop: Shop, served: Any) -> None:
    asked, loaded, [afterwards] = served["poisoned"]
    assert "NaN" in asked["error"]
    assert "NaN" in loaded["error"]
    assert afterwards["tokens"] == shop.reference("base", SHARED)


def test_ranks_and_alphas_by_module(shop: Shop, served: Any, stock: Any) -> None:
    uneven, odd = served["patterns"]
    if not abilities.reads_patterns():
        assert "ignores" in uneven["error"]
        assert "ignores" in odd["error"]
        return
    assert of(uneven) == [shop.reference("uneven", SHARED), shop.reference("base", SHARED)]
    assert odd[0]["tokens"] == stock["odd"][0][0]["tokens"] != odd[1]["tokens"] == shop.reference("base", SHARED)


def test_a_reload_keeps_the_cache_and_takes_the_new_weights(shop: Shop, served: Any) -> None:
    loaded, [reply], refused, [still] = served["reload"]
    assert loaded is True
    assert reply["tokens"] == still["tokens"] == shop.reference("chat", SHARED)
    assert reply["cached"] == len(SHARED) // BLOCK * BLOCK
    assert "another name" in refused["error"]


def test_without_decoder_rows_specialists_are_wrong_and_nobody_else(shop: Shop, served: Any) -> None:
    """What these tests would miss if sampling read scheduled rows: nothing."""
    _, [chat, base, plain] = served["mutant"]
    assert chat["tokens"] == base["tokens"] == shop.reference("base", SHARED) != shop.reference("chat", SHARED)
    assert plain["tokens"] == served["in turn"][3][0]["tokens"]


def test_with_chunked_prefill_and_preemption(either: Shop, stock: Any) -> None:
    """A budget of 24 rows cuts every longer prompt, and 14 blocks hold only a few requests at a time."""
    options = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 14, "enable_prefix_caching": False}
    steps = [ask(*MIXED), {"counted": "vllm:num_preemptions"}]
    replies, preempted = either.serve(steps, disable_log_stats=False, **options)
    check(either, stock, replies)
    assert preempted > 0


def test_compiled(shop: Shop, stock: Any) -> None:
    """A graph that is traced once serves steps of all kinds: lone requests, mixed batches, other weights in a slot."""
    alone = [asked for asked in ALONE if len(asked[1]) in (1, 33)]
    reload = {"load": {"name": "sql", "lora_path": str(shop.folder / "chat"), "load_inplace": True}}
    steps = [*(ask(asked) for asked in alone), ask(*MIXED), reload]
    steps.append(ask(("sql", SHARED), ("base", SHARED), ("wide", SHARED)))
    *lone, mixed, _, [sql, base, wide] = shop.serve(steps, enforce_eager=False, max_num_batched_tokens=64)
    for (model, prompt), [reply] in zip(alone, lone, strict=True):
        assert reply["tokens"] == shop.reference(model, prompt), (model, len(prompt))
    check(shop, stock, mixed)
    assert sql["tokens"] == shop.reference("chat", SHARED)
    assert base["tokens"] == shop.reference("base", SHARED)
    assert wide["tokens"] == stock["wide"][0][0]["tokens"]


def test_with_ngram_speculation(either: Shop, stock: Any) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    check(either, stock, either.serve([ask(*MIXED)], speculative_config=drafts)[0])


def test_everybody_writes_the_same_cache(either: Shop) -> None:
    """Blocks of a prompt and of 40 generated tokens, forced to be the same for all, each written by another model."""
    forced = {"max_tokens": 41, "allowed_token_ids": [7]}
    requests = [{"model": m, "prompt": SHARED[:64], "sampling": forced} for m in ("base", "sql", "chat", "plain")]
    [base, sql, chat, plain] = either.serve([{"written": requests}], enable_prefix_caching=False)[0]
    assert {tuple(reply["tokens"]) for reply in (base, sql, chat, plain)} == {(7,) * 41}
    assert len(base["content"]) == 3 * tiny(**SHAPE).config.num_hidden_layers
    assert base["content"] == sql["content"] == chat["content"]
    assert set(plain["content"]).isdisjoint(base["content"])


def test_sharing_means_the_same_blocks(served: Any) -> None:
    [[sql, chat, base, plain]] = served["same blocks"]
    assert sql["blocks"] == chat["blocks"] == base["blocks"]
    assert sql["content"] == chat["content"] == base["content"]
    assert set(plain["blocks"]).isdisjoint(base["blocks"])


@pytest.mark.parametrize("caching", [True, False])
def test_a_request_that_turns_nan_leaves_none_for_others(either: Shop, caching: bool) -> None:
    """Few blocks, so that others get them: of a request that has ended, of one that was taken back in the middle of its
    prompt, and while one runs."""
    long = tokens(200, seed=900).tolist()
    others = [ask(*((model, prompt) for model in ("base", "sql", "plain"))) for prompt in prompts(910)]
    steps = [
        ask(("exploding", long)),
        *others[:3],
        {"cancel": {"model": "exploding", "prompt": tokens(200, seed=901).tolist(), "steps": 2}},
        *others[3:6],
        *(ask(("exploding", long[:40]), *asked_of(step)) for step in others[6:]),
    ]
    options = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 64, "enable_prefix_caching": caching}
    results = either.serve(steps, **options)
    assert results[4] == 0, "it was taken back before it sampled"
    fresh = either.serve(others, **options)
    for got, wanted in zip([*results[1:4], *results[5:8], *(result[1:] for result in results[8:])], fresh, strict=True):
        assert of(got) == of(wanted)
    assert [of(reply)[0] for reply in fresh] == [either.reference("base", prompt) for prompt in prompts(910)]


def asked_of(step: Step) -> list[Asked]:
    return [(request["model"], request["prompt"]) for request in step["ask"]]


@pytest.mark.parametrize("either", ["V1"], indirect=True, scope="session")  # V2 draws other tokens for a seed
def test_with_buffers_on_a_device_and_asynchronous_scheduling(shop: Shop, served: Any) -> None:
    """As on a GPU, but for its kernels, and on model runner V1: all answers are those of ordinary engines."""
    there = shop.serve_parts(all_steps(shop), as_on_a_gpu=True)
    for name, replies in there.items():
        for got, wanted in zip(flat(replies), flat(served[name]), strict=True):
            if isinstance(got, dict):
                for logprobs in ("scored", "sampled"):
                    assert got.pop(logprobs, []) == pytest.approx(wanted.pop(logprobs, []), abs=1e-3), name
            assert got == wanted, name


def flat(replies: list[Any]) -> list[Any]:
    """Copies of what came of some steps: replies, errors, or whether a load succeeded."""
    return [
        dict(reply) if isinstance(reply, dict) else reply
        for step in replies
        for reply in (step if isinstance(step, list) else [step])
    ]


def test_two_tensor_parallel_ranks(shop: Shop, ranks: Any, stock: Any) -> None:
    check(shop, stock, ranks["mixed"][0])


def test_ranks_replace_an_adapter_together_or_not_at_all(shop: Shop, ranks: Any) -> None:
    """One that cannot copy it would go on with the old weights, beside others with the new ones."""
    before, opened = ranks["before"]
    assert of(before) == [shop.reference("sql", SHARED)]
    between = ranks["refused"]
    for refused, still, left in zip(between[1::4], between[2::4], between[3::4], strict=True):
        assert "cannot be copied" in refused["error"]
        assert of(still) == of(before)
        assert left == opened
    _, loaded, after, kept = ranks["after"]
    assert loaded is True
    assert of(after) == [shop.reference("chat", SHARED)]
    assert kept == opened


def test_embeddings_as_prompts(either: Shop) -> None:
    step = ask(*((model, prompt) for prompt in prompts(0)[2:5] for model in ("base", "sql", "chat")))
    for request in step["ask"][::2]:  # beside prompts of tokens
        request["embedded"] = True
    replies = either.serve([step], enable_prompt_embeds=True)[0]
    for request, got in zip(step["ask"], of(replies), strict=True):
        assert got == either.reference(request["model"], request["prompt"]), request["model"]


def test_kv_events_name_no_adapter_where_the_cache_is_shared(shop: Shop) -> None:
    """So that routers and connectors find the block whoever asks."""
    step = {"published": ask(*((model, SHARED) for model in ("sql", "chat", "plain")))["ask"]}
    events = {"enable_kv_cache_events": True, "publisher": "null"}
    sql, chat, plain = shop.serve([step], kv_events_config=events)[0]
    assert sql["stored"] >= 1
    assert all(named == [None, None] for named in sql["adapters"])
    assert chat["stored"] == 0, "all of its full blocks were there"
    assert plain["adapters"]
    assert all(named == [3, "plain"] for named in plain["adapters"])


def test_a_connector_brings_one_specialist_what_another_one_stored(either: Shop, tmp_path: Path) -> None:
    """By way of vLLM's example connector, from one engine to the next; its keys are tokens alone."""
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    connector["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}
    options = {"kv_transfer_config": connector, "disable_log_stats": False}
    prompt, count = tokens(100, seed=700).tolist(), {"counted": "vllm:external_prefix_cache_hits"}
    [first], none = either.serve([ask(("sql", prompt)), count], **options)
    [other], brought = either.serve([ask(("chat", prompt)), count], **options)
    assert first["tokens"] == either.reference("sql", prompt)
    assert other["tokens"] == either.reference("chat", prompt)
    assert (none, brought) == (0, 96)


def test_conventional_adapters_of_embeddings_and_of_the_head(served: Any, stock: Any) -> None:
    wanted = of(stock["wide"][1])
    assert of(served["wide"][0]) == wanted
    assert len({tuple(tokens) for tokens in wanted[-3:]}) == 3


def test_a_scored_prompt_has_nobodys_head(shop: Shop, served: Any) -> None:
    """Two rows are scored in a step that samples two, of which the first has an adapter there."""
    [[_, scored]] = served["scored beside a head"]
    assert scored["scored"] == pytest.approx(shop.scores("base", SHARED[:3]), abs=1e-3)


def test_more_adapters_than_slots(either: Shop, stock: Any) -> None:
    """Two slots for three adapters: weights come and go between steps."""
    check(either, stock, either.serve([ask(*MIXED)], max_loras=2, max_cpu_loras=3)[0])


def test_a_conventional_adapter_is_replaced_by_its_next_version(shop: Shop) -> None:
    """Which finds no K/V of the old one in the cache, and neither does the old one when it comes back."""
    other = shop.folder / "plain-2"
    shutil.copytree(shop.folder / "plain", other)
    tensors(lambda values: [tensor.neg_() for name, tensor in values.items() if "lora_B" in name])(other)
    old, new = (
        {"load": {"name": "plain", "lora_path": str(shop.folder / name), "load_inplace": True}}
        for name in ("plain", "plain-2")
    )
    asked = ask(("plain", SHARED))
    first, again, _, second, found, _, third = shop.serve([asked, asked, new, asked, asked, old, asked])
    fresh = shop.serve([new, asked], enable_prefix_caching=False)[1]
    whole_blocks = len(SHARED) // BLOCK * BLOCK
    assert [reply["cached"] for [reply] in (first, again, second, found, third)] == [0, whole_blocks] * 2 + [0]
    assert of(first) == of(again) == of(third) != of(second) == of(found) == of(fresh)


@pytest.mark.parametrize("name", ["sql", "plain"])
def test_weights_that_vllm_would_leave_out_are_refused(shop: Shop, name: str) -> None:
    """The deployment applies some modules alone, and stock vLLM says nothing."""
    loaded, [base] = shop.serve([{"load": {"name": name}}, ask(("base", SHARED))], lora_target_modules=["q_proj"])
    assert "which vLLM would leave out" in loaded["error"]
    assert base["tokens"] == shop.reference("base", SHARED)


def test_an_evicted_adapter_outlives_its_folder(shop: Shop) -> None:
    """One slot, in memory too: each request here reads its adapter again, and at last the folder is gone."""
    gone = str(shutil.copytree(shop.folder / "sql", shop.folder / "gone"))
    steps = [{"load": {"name": "sql", "lora_path": gone}}, ask(("sql", SHARED)), ask(("chat", SHARED))]
    steps += [{"delete": gone}, ask(("sql", SHARED)), ask(("chat", SHARED))]
    gone = str(shutil.copytree(shop.folder / "plain", shop.folder / "gone as well"))
    steps += [{"load": {"name": "plain", "lora_path": gone}}, ask(("plain", SHARED)), ask(("chat", SHARED))]
    steps += [{"delete": gone}, ask(("plain", SHARED))]
    results = shop.serve(steps, max_loras=1, max_cpu_loras=1, enable_prefix_caching=False)
    _, [first], [other], _, [again], [last], _, [plain], _, _, [plain_again] = results
    assert first["tokens"] == again["tokens"] == shop.reference("sql", SHARED)
    assert other["tokens"] == last["tokens"] == shop.reference("chat", SHARED)
    assert plain["tokens"] == plain_again["tokens"]


def test_stock_operators_are_refused_on_a_cpu(shop: Shop) -> None:
    steps = [ask(("sql", SHARED)), ask(("base", SHARED))]
    refused, [base] = shop.serve(steps, variables={"ICARUS_CPU_LORA": "0"})
    assert "unset ICARUS_CPU_LORA" in refused["error"]
    assert base["tokens"] == shop.reference("base", SHARED)


def test_a_worker_with_another_runner_is_refused_adapters_that_share(either: Shop, stock: Any) -> None:
    """It would serve them as plain LoRA, and leave their K/V to others; everything else goes on there."""
    [asked_of_stock] = in_turn()[0]["ask"]
    steps = [
        {"load": {"name": "sql"}},
        ask(("base", SHARED), ("plain", asked_of_stock["prompt"])),
        ask(("sql", SHARED)),
    ]
    loaded, [base, plain], asked = either.serve(steps, worker_cls="unchanged_worker.UnchangedWorker", max_loras=5)
    for refused in (asked, loaded):
        assert "rank 0 runs the model runner unchanged_worker.UnchangedRunner" in refused["error"]
    assert base["tokens"] == either.reference("base", SHARED)
    assert plain["tokens"] == stock["in turn"][0][0]["tokens"]
