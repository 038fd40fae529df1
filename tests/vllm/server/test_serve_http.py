"""One server, started by ``icarus serve``, and everything that its clients may do to it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import malformed, surfaces
from benchmarks.soak.surfaces import BROKEN, MUTE, REFUSED, SERVED, Seen
from engines import BLOCK, SHAPE
from http_server import CONTEXT, LETTERS, QUEUE, Server, body, eventually, serving
from icarus import adapter
from specimens import CONVENTIONAL_DAMAGES
from strict_skips import needs_vllm
from tiny_models import tiny, tiny_tokenizer, tokens

pytestmark = [pytest.mark.engine, needs_vllm]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("shop")) as running:
        yield running


_fresh = iter(range(1000, 100000))


def prompt(length: int) -> list[int]:
    """One that no test used before."""
    return tokens(length, seed=next(_fresh)).tolist()


@pytest.fixture(autouse=True)
def _lives(server: Server) -> Iterator[None]:
    """Whatever a test did, the next request is answered, and rightly."""
    yield
    asked = prompt(40)
    assert server.ask("chat", asked)[0] == server.shop.reference("chat", asked, 8)


# ------------------------------------------------------------------------------------------------- what is served


def test_specialists_are_listed_with_their_parent(server: Server) -> None:
    models = server.models()
    assert {"base", "sql", "chat", "plain", "early"} <= models.keys()
    assert models["base"]["parent"] is None
    assert {models[name]["parent"] for name in ("sql", "chat", "plain", "early")} == {"base"}


def test_the_start_says_what_is_shared(server: Server) -> None:
    said = server.log.read_text()
    assert re.search(r"sql +shares it", said)
    assert re.search(r"plain +its own cache", said)


def test_tokens_and_cached_tokens(server: Server) -> None:
    asked = prompt(100)
    for model, cached in (("sql", 0), ("chat", 96), ("base", 96), ("early", 96)):
        assert server.ask(model, asked) == (
            server.shop.reference("chat" if model == "early" else model, asked, 8),
            cached,
        )
    assert [server.ask("plain", asked)[1] for _ in range(2)] == [0, 96], "a conventional adapter has a cache of its own"


@pytest.mark.parametrize("chat", [False, True])
def test_cached_tokens_are_there_in_streams_too(server: Server, chat: bool) -> None:
    text = "".join(tiny_tokenizer().convert_ids_to_tokens(prompt(70)))
    for wanted in (0, 64):
        options: dict[str, Any] = {"model": "sql", "max_tokens": 2, "stream": True}
        options["stream_options"] = {"include_usage": True}
        if chat:
            stream: Any = server.openai.chat.completions.create(messages=[{"role": "user", "content": text}], **options)
        else:
            stream = server.openai.completions.create(prompt=text, **options)
        *_, last = stream
        assert last.usage.prompt_tokens_details.cached_tokens == wanted


@pytest.mark.parametrize("chat", [False, True])
def test_cached_tokens_are_in_answers_of_beam_search_too(server: Server, chat: bool) -> None:
    text = "".join(tiny_tokenizer().convert_ids_to_tokens(prompt(70)))
    content: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    content |= {"model": "sql", "max_tokens": 3, "temperature": 0, "n": 2, "use_beam_search": True}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    for cached in (0, 64):
        reply = server.post(path, **content).json()
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == cached


@pytest.mark.parametrize("model", ["base", "sql", "plain"])
def test_lm_eval_over_http_gives_the_scores_in_process(
    model: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of a prompt, a whole text and an answer, by ``local-completions`` and by ``icarus.evaluate.harness``."""
    pytest.importorskip("tenacity")  # of lm-eval's class
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from harness_tasks import save_tasks, scores
    from icarus.evaluate.harness import IcarusLM

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tasks(tmp_path)
    address = f"{server.openai.base_url}completions"
    options = {"tokenizer_backend": "huggingface", "tokenizer": str(server.shop.base), "max_length": CONTEXT}
    over_http = LocalCompletionsAPI(base_url=address, model=model, **options)
    named = {} if model == "base" else {"adapter": str(server.shop.folder / model)}
    in_process = IcarusLM(str(server.shop.base), dtype="float32", device="cpu", **named)
    served = scores(over_http, tmp_path)
    assert_close(served, scores(in_process, tmp_path))
    if named:  # of whom others' scores are far
        with pytest.raises(AssertionError):
            assert_close(served, scores(IcarusLM(str(server.shop.base), dtype="float32", device="cpu"), tmp_path))


def assert_close(one: Any, other: Any) -> None:
    """The same but for the rounding of floats."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), [other[name] for name in one]
    if isinstance(one, list):
        for part, its in zip(one, other, strict=True):
            assert_close(part, its)
    else:
        assert one == (pytest.approx(other, abs=2e-3) if isinstance(other, float) else other)


def test_hand_over_without_prefill(server: Server) -> None:
    """A conversation goes from one model to the next; all that was generated is in the cache, too."""
    size = len(
        tiny_tokenizer().apply_chat_template([{"role": "user", "content": "x" * 80}], add_generation_prompt=True)[
            "input_ids"
        ]
    )
    messages: list[Any] = [{"role": "user", "content": "".join(tiny_tokenizer().convert_ids_to_tokens(prompt(80)))}]
    held, new = 0, 50
    for model in ("sql", "chat", "base", "sql"):
        reply = server.openai.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=new,
            temperature=0,
            extra_body={"allowed_token_ids": LETTERS, "ignore_eos": True},
        )
        usage = reply.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == held // BLOCK * BLOCK
        assert usage.prompt_tokens >= size
        held = usage.prompt_tokens + new - 1  # the last token was never a row
        messages += [reply.choices[0].message.model_dump(include={"role", "content"}), {"role": "user", "content": "?"}]


def test_the_example_of_a_hand_over_runs(server: Server) -> None:
    example = Path(__file__).parents[3] / "examples" / "handover.py"
    command = [sys.executable, str(example), str(server.openai.base_url), "sql"]  # its context has room for one model
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["sql:", "sql:"]


def test_salts_part_the_cache(server: Server) -> None:
    asked = prompt(70)
    cached = [server.ask(model, asked, cache_salt=salt)[1] for salt in ("a", "b", "a") for model in ("sql", "chat")]
    assert cached == [0, 64, 0, 64, 64, 64]


# ------------------------------------------------------------------------------------------------- requests


def test_streams(server: Server) -> None:
    asked = prompt(40)
    got: list[int] = []
    with server.http.stream("POST", "/v1/completions", json=body("sql", asked, stream=True)) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                got += [token for choice in json.loads(line[6:])["choices"] for token in choice["token_ids"] or []]
    assert got == server.shop.reference("sql", asked, 8)


def test_several_choices_and_seeds(server: Server) -> None:
    asked = prompt(40)
    sampled = {"temperature": 1.0, "n": 3, "seed": 5}
    first, second, other = (
        [
            choice["token_ids"]
            for choice in server.post("/v1/completions", **body("sql", asked, **options)).json()["choices"]
        ]
        for options in (sampled, sampled, {**sampled, "seed": 6})
    )
    assert first == second != other
    assert len({tuple(choice) for choice in first}) == 3


def test_stop_strings_and_minimum_and_maximum(server: Server) -> None:
    asked = prompt(40)
    text = server.post("/v1/completions", **body("sql", asked, max_tokens=20, allowed_token_ids=LETTERS)).json()
    whole = text["choices"][0]["text"]
    assert len(whole) == 20
    stop = whole[4]
    cut = server.post(
        "/v1/completions", **body("sql", asked, max_tokens=20, allowed_token_ids=LETTERS, stop=[stop])
    ).json()
    assert cut["choices"][0]["text"] == whole[: whole.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    least = body("sql", asked, max_tokens=20, min_tokens=20, ignore_eos=False)
    assert server.post("/v1/completions", **least).json()["usage"]["completion_tokens"] == 20


def test_logprobs_are_the_specialists(server: Server) -> None:
    asked = prompt(40)
    reply = server.post("/v1/completions", **body("sql", asked, prompt_logprobs=0, logprobs=1, max_tokens=1)).json()
    scored = [next(iter(at.values()))["logprob"] for at in reply["choices"][0]["prompt_logprobs"][1:]]
    assert scored == pytest.approx(server.shop.scores("sql", asked), abs=1e-3)
    assert reply["choices"][0]["logprobs"]["token_logprobs"][0] <= 0


SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


def test_structured_output(server: Server) -> None:
    reply = server.openai.chat.completions.create(
        model="sql",
        messages=[{"role": "user", "content": "?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
        max_tokens=200,
        temperature=1,
        seed=1,
    )
    content = reply.choices[0].message.content or ""
    if reply.choices[0].finish_reason == "stop":  # a random model may also write blanks for ever
        assert isinstance(json.loads(content)["yes"], bool)
    else:
        assert content.lstrip().startswith("{")


def test_a_grammar_chooses_among_the_specialists_tokens(server: Server) -> None:
    """The likeliest letter is another one for each model, and the reference says which."""
    letters = [text for text in tiny_tokenizer().convert_ids_to_tokens(LETTERS) if text.isalpha()][:16]
    differ = False
    for _ in range(3):
        asked, picked = prompt(40), dict[str, str]()
        for model in ("base", "sql", "chat"):
            wanted = body(model, asked, max_tokens=1, structured_outputs={"choice": letters})
            picked[model] = server.post("/v1/completions", **wanted).json()["choices"][0]["text"]
            context = server.shop.team.context().append(asked)
            scores = {letter: context.score(letter, [model])[model][0] for letter in letters}
            assert picked[model] == max(scores, key=lambda letter: scores[letter]), model
        differ |= len(set(picked.values())) > 1
    assert differ, "the models agree, so this test saw nothing"


def test_a_tool_is_called(server: Server) -> None:
    tool: Any = {"type": "function", "function": {"name": "ask", "parameters": SCHEMA, "strict": True}}
    reply = server.openai.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "ask"}},
        max_tokens=200,
        temperature=1,
        seed=2,
    )
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.function.name == "ask"
    assert call.function.arguments.lstrip().startswith("{")


# ------------------------------------------------------------------------------------------------- bad requests


def test_unknown_model(server: Server) -> None:
    assert server.post("/v1/completions", **body("nobody", [5])).status_code == 404


def test_a_prompt_that_is_too_long(server: Server) -> None:
    assert server.post("/v1/completions", **body("sql", prompt(CONTEXT + 1))).status_code == 400


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/load_lora_adapter"]
)
def test_a_body_that_is_no_json(server: Server, path: str) -> None:
    reply = server.http.post(path, content=b"{nonsense", headers={"Content-Type": "application/json"})
    assert reply.status_code == 400


def test_a_full_queue(server: Server) -> None:
    reply = server.post("/v1/completions", **body("sql", prompt(5), n=QUEUE + 1, temperature=1))
    assert reply.status_code == 503


def test_an_adapter_of_another_base_model(server: Server) -> None:
    reply = server.load("foreign", server.shop.folder / "foreign")
    assert (reply.status_code, "foreign" in server.models()) == (400, False)
    assert "another base model" in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["sql", "plain"])
def test_a_damaged_adapter(server: Server, kind: str) -> None:
    folder = server.shop.folder / f"damaged-{kind}"
    shutil.copytree(server.shop.folder / kind, folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    reply = server.load("damaged", folder)
    assert (reply.status_code, "damaged" in server.models()) == (400, False)
    assert "truncated" in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["icarus", "conventional"])
def test_malformed_adapters(server: Server, kind: str) -> None:
    """Each is refused with a sentence or served, as is written beside it."""
    sound = server.shop.folder / ("sql" if kind == "icarus" else "plain")
    for number, case in enumerate(case for case in malformed.some() if case.kind == kind):
        folder = case.make(sound, server.shop.folder / f"malformed-{kind}-{number}")
        reply = server.load("malformed", folder)
        if reply.status_code == 200:
            answer = server.post("/v1/completions", **body("malformed", prompt(20)))
            seen = Seen(SERVED if answer.status_code == 200 else MUTE, answer.text, 0)
            assert answer.status_code in (200, 400), (case.name, answer.text)
            assert server.post("/v1/unload_lora_adapter", lora_name="malformed").status_code == 200
        else:
            seen = Seen(REFUSED if reply.status_code == 400 else BROKEN, reply.json()["error"]["message"], 0)
        assert surfaces.fault(case, seen, "http") == "", case.name


@pytest.mark.parametrize("damage", CONVENTIONAL_DAMAGES)
def test_a_bad_conventional_adapter(server: Server, damage: str) -> None:
    spoil, message = CONVENTIONAL_DAMAGES[damage]
    folder = Path(shutil.copytree(server.shop.folder / "plain", server.shop.folder / f"bad-{damage.replace(' ', '-')}"))
    spoil(folder)
    reply = server.load("bad", folder)
    assert (reply.status_code, "bad" in server.models()) == (400, False)
    assert re.search(message, reply.json()["error"]["message"])


def test_paths_that_are_no_folders_of_adapters(server: Server) -> None:
    (server.shop.folder / "empty").mkdir()
    for path, status, message in (
        ("missing", 404, "No adapter"),
        ("empty", 400, "adapter_config.json is missing"),
        ("plain/adapter_config.json", 400, "is a file and an adapter is a folder"),
        ("n" * 300, 400, "cannot be read"),
    ):
        reply = server.load("nothing", server.shop.folder / path)
        assert reply.status_code == status, reply.text
        assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("name", ["text", "image", "input", "base"])
def test_a_name_that_means_something_else(server: Server, name: str) -> None:
    before = server.models().keys()
    reply = server.load(name, server.shop.folder / "sql")
    assert (reply.status_code, server.models().keys()) == (400, before)
    messages = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    answers = [
        server.post("/v1/chat/completions", model=model, messages=messages, max_tokens=8, temperature=0).json()
        for model in ("base", "sql")
    ]
    assert [answer["model"] for answer in answers] == ["base", "sql"]


def test_an_adapter_that_is_too_large(server: Server) -> None:
    folder = server.shop.folder / "large"
    adapter.save(adapter.attach(tiny(**SHAPE), rank=9), folder)
    reply = server.load("large", folder)
    assert reply.status_code == 400
    assert "--max-lora-rank" in reply.json()["error"]["message"]


def test_a_path_outside_the_allowed_folders(server: Server, tmp_path: Path) -> None:
    shutil.copytree(server.shop.folder / "sql", tmp_path / "sql")
    (server.shop.folder / "link").symlink_to(tmp_path / "sql")
    for folder in (
        tmp_path / "sql",
        server.shop.folder / "link",
        server.shop.folder / ".." / ".." / "sql",
        Path("/nowhere"),
    ):
        reply = server.load("outside", folder)
        assert reply.status_code == 403, folder
        assert "--allow-adapters-from" in reply.json()["error"]["message"]


def test_a_conventional_adapter_in_the_place_of_an_icarus_one(server: Server) -> None:
    reply = server.load("sql", server.shop.folder / "plain", load_inplace=True)
    assert reply.status_code == 400
    assert "another name" in reply.json()["error"]["message"]
    asked = prompt(40)
    assert server.ask("sql", asked)[0] == server.shop.reference("sql", asked, 8)


def test_who_hangs_up_frees_the_request(server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total")
    with server.http.stream(
        "POST", "/v1/completions", json=body("sql", prompt(9), max_tokens=370, stream=True)
    ) as reply:
        next(reply.iter_lines())
    eventually(lambda: server.metric("vllm:num_requests_running") == 0)
    assert server.metric("vllm:generation_tokens_total") - before < 300, "it was not generated to its end"


# ------------------------------------------------------------------------------------------------- adapters come and go


def test_load_and_unload(server: Server) -> None:
    asked = prompt(70)
    assert server.ask("base", asked)[1] == 0
    for prefix in ("/v1", ""):
        content = {"lora_name": "late", "lora_path": str(server.shop.folder / "sql")}
        reply = server.post(f"{prefix}/load_lora_adapter", **content)
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'late' added successfully.")
        assert server.load("late", server.shop.folder / "sql").status_code == 400, "it is there"
        assert server.ask("late", asked) == (server.shop.reference("sql", asked, 8), 64)
        assert server.post(f"{prefix}/unload_lora_adapter", lora_name="late").status_code == 200
        assert server.post("/v1/completions", **body("late", asked)).status_code == 404


def test_an_unloaded_adapter_leaves_the_engine_with_its_last_request(server: Server) -> None:
    from icarus.vllm.server.loading import UNLOAD_GRACE_S  # imports vLLM

    time.sleep(UNLOAD_GRACE_S + 2)  # what other tests have unloaded leaves first
    assert server.load("leaving", server.shop.folder / "sql").status_code == 200
    copies = server.copies()
    asked, got = prompt(40), list[int]()
    content = body("leaving", asked, max_tokens=CONTEXT - 50, stream=True)
    with server.http.stream("POST", "/v1/completions", json=content) as reply:
        for line in reply.iter_lines():
            if not got:
                assert server.post("/v1/unload_lora_adapter", lora_name="leaving").status_code == 200
            if line.startswith("data: {"):
                got += [token for choice in json.loads(line[6:])["choices"] for token in choice["token_ids"] or []]
    assert got == server.shop.reference("sql", asked, CONTEXT - 50)
    eventually(lambda: server.copies() == copies - 2)


def test_reloads_under_load(server: Server) -> None:
    """No request fails, others are not disturbed, each token is of one set of weights, and the next request is of the
    new ones, with a warm cache."""
    shop, versions = server.shop, ("sql", "chat")
    assert server.load("agent", shop.folder / versions[0]).status_code == 200
    done: list[tuple[str, list[int], list[int]]] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def go_on(model: str, asked: list[int]) -> None:
        while not stop.is_set():
            try:
                done.append((model, asked, server.ask(model, asked, max_tokens=24)[0]))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=go_on, args=(model, prompt(40))) for model in ("agent", "agent", "base", "chat")]
    kept = server.metric("icarus:cache_blocks_kept_on_swap_total")
    swaps = server.metric("icarus:adapter_swaps_total", adapter="agent")
    for thread in threads:
        thread.start()
    try:
        asked = prompt(70)
        server.ask("base", asked)
        for turn in range(1, 11):
            version = versions[turn % 2]
            assert server.load("agent", shop.folder / version, load_inplace=True).status_code == 200
            assert server.ask("agent", asked) == (shop.reference(version, asked, 8), 64)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert server.metric("icarus:adapter_swaps_total", adapter="agent") == swaps + 10
    assert server.metric("icarus:cache_blocks_kept_on_swap_total") > kept
    pure = {(model, *asked): shop.reference(model, asked, 24) for model in versions for _, asked, _ in done}
    pure |= {("base", *asked): shop.reference("base", asked, 24) for model, asked, _ in done if model == "base"}
    crossed = 0
    for model, asked, got in done:
        if model != "agent":
            assert got == pure[model, *asked]
        elif got not in (pure[versions[0], *asked], pure[versions[1], *asked]):
            crossed += 1
            for index, token in enumerate(got):
                assert any([token] == shop.reference(version, asked + got[:index], 1) for version in versions)
    assert {model for model, _, _ in done} == {"agent", "base", "chat"}
    assert crossed, "no request ran across a reload, so this test saw nothing"


def test_weights_that_change_under_their_path(server: Server) -> None:
    shop, asked = server.shop, prompt(70)
    folder = shop.folder / "same"
    shutil.copytree(shop.folder / "sql", folder)
    assert server.load("same", folder).status_code == 200
    assert server.ask("same", asked)[0] == shop.reference("sql", asked, 8)
    shutil.copytree(shop.folder / "chat", folder, dirs_exist_ok=True)
    assert server.ask("same", asked)[0] == shop.reference("sql", asked, 8), "until it is loaded again"
    assert server.load("same", folder, load_inplace=True).status_code == 200
    assert server.ask("same", asked) == (shop.reference("chat", asked, 8), 64)


def test_a_watched_folder(server: Server) -> None:
    shop, asked = server.shop, prompt(70)

    def answers(version: str) -> bool:
        reply = server.post("/v1/completions", **body("followed", asked))
        return reply.status_code == 200 and reply.json()["choices"][0]["token_ids"] == shop.reference(version, asked, 8)

    folder = server.watched / "followed"
    folder.mkdir()
    shutil.copy(shop.folder / "sql" / "adapter_config.json", folder)  # half of it
    (server.watched / "broken").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(shop.folder / "foreign" / file, server.watched / "broken")
    shutil.copytree(shop.folder / "poisoned", server.watched / "poisoned")
    time.sleep(3)
    assert not {"followed", "broken", "poisoned"} & server.models().keys()
    shutil.copy(shop.folder / "sql" / "adapter_model.safetensors", folder)
    eventually(lambda: answers("sql"))
    shutil.copytree(shop.folder / "chat", folder, dirs_exist_ok=True)
    eventually(lambda: answers("chat"))
    shutil.rmtree(folder)
    eventually(lambda: "followed" not in server.models())
    assert server.post("/v1/completions", **body("followed", asked)).status_code == 404
    for refused in ("broken", "poisoned"):
        assert server.log.read_text().count(f"Not loaded from {server.watched / refused}") == 1


# ------------------------------------------------------------------------------------------------- metrics


def test_metrics(server: Server) -> None:
    asked = prompt(70)

    def hits(writer: str, reader: str) -> float:
        return server.metric("icarus:prefix_hits_tokens_total", writer=writer, reader=reader)

    pairs = [("sql", "sql"), ("sql", "chat"), ("sql", "base"), ("chat", "sql")]
    before = [hits(*pair) for pair in pairs]
    rows, decoders = server.metric("icarus:scheduled_rows_total"), server.metric("icarus:decoder_rows_total")
    vllms = server.metric("vllm:prefix_cache_hits_total")
    for model in ("sql", "chat", "base"):
        server.ask(model, asked)
    assert [hits(*pair) - was for pair, was in zip(pairs, before, strict=True)] == [0, 64, 64, 0]
    assert server.metric("vllm:prefix_cache_hits_total") - vllms == 128
    assert server.metric("icarus:decoder_rows_total") - decoders == 2 * 8, "none for the base model"
    assert server.metric("icarus:scheduled_rows_total") - rows == 70 + 6 + 6 + 3 * 7
    assert server.metric("icarus:adapter_loads_total", adapter="plain") == 1
    assert server.metric("icarus:adapter_load_seconds_count") == server.metric("icarus:adapter_loads_total")
    assert (
        server.http.get("/metrics", headers={"Accept-Encoding": "gzip"})
        .text.rstrip()
        .splitlines()[-1]
        .startswith("icarus:")
    )
