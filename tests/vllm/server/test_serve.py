"""``icarus serve`` without a server: what vLLM is called with, what may be loaded, and how a folder is followed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import tiny
from icarus import adapter, cli
from icarus.arguments import Parser
from icarus.errors import AdapterError, InputError
from icarus.vllm import counters
from icarus.vllm.engine import counting
from icarus.vllm.server import folders, serve, watch
from saved import save_base
from strict_skips import needs_vllm


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_base(folder / "base")
    for name in ("team/sql", "team/chat", "plain"):
        adapter.save(adapter.attach(tiny(), rank=4), folder / name)
    plain = folder / "plain"
    config = json.loads((plain / "adapter_config.json").read_text())
    del config["icarus"]
    (plain / "adapter_config.json").write_text(json.dumps(config))
    return folder


def planned(*words: str, **environment: str) -> serve.Plan:
    parser = Parser(prog="icarus serve")
    serve.add_arguments(parser)
    return serve.plan(parser.parse_args(words), environment)


def value(made: serve.Plan, flag: str) -> list[str]:
    """The words that follow a flag, up to the next one; once and not twice."""
    assert made.flags.count(flag) == 1, made.flags
    after = made.flags[made.flags.index(flag) + 1 :]
    end = next((index for index, word in enumerate(after) if word.startswith("--")), len(after))
    return after[:end]


# ------------------------------------------------------------------------------------------------- the command line


def test_adapters_are_lora_modules_and_all_else_is_vllms(home: Path) -> None:
    made = planned(
        *(str(home / "base"), "--adapters", f"sql={home}/team/sql", f"chat={home}/team/chat"),
        *("--port", "8123", "--adapters", f"plain={home}/plain", "--compilation-config.level", "0", "--enforce-eager"),
    )
    assert made.flags[-5:] == ["--port", "8123", "--compilation-config.level", "0", "--enforce-eager"]
    modules = [json.loads(word) for word in value(made, "--lora-modules")]
    assert modules == [
        {"name": name, "path": str(home / path), "base_model_name": str(home / "base")}
        for name, path in (("sql", "team/sql"), ("chat", "team/chat"), ("plain", "plain"))
    ]
    assert [bool(served.base_fingerprint) for served in made.adapters] == [True, True, False]
    assert value(made, "--max-lora-rank") == ["8"]
    assert value(made, "--max-loras") == ["8"]
    assert value(made, "--served-model-name") == [str(home / "base")]
    assert value(made, "--enable-prompt-tokens-details") == value(made, "--enable-lora") == []


@pytest.mark.parametrize("word", ["--max-lora-rank=64", "--max_lora_rank=64"])
def test_what_the_user_says_stands(home: Path, word: str) -> None:
    made = planned(str(home / "base"), word, "--served-model-name", "a", "b", "--no-enable-prompt-tokens-details")
    assert "--max-lora-rank" not in made.flags
    assert value(made, "--served-model-name") == ["a", "b"]
    assert "--enable-prompt-tokens-details" not in made.flags


def test_the_config_file_counts_as_said(home: Path, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text("max_loras: 3\nserved-model-name: x\n")
    made = planned(str(home / "base"), "--config", str(tmp_path / "flags.yaml"))
    assert not {"--max-loras", "--served-model-name"} & set(made.flags)
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        planned(str(home / "base"), "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(("rank", "least"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (257, 320), (512, 512)])
def test_the_least_rank_with_room(rank: int, least: int) -> None:
    assert serve.allowed_rank(rank) == least


def test_no_rank_beyond_vllms() -> None:
    with pytest.raises(InputError, match="up to 512"):
        serve.allowed_rank(513)


@needs_vllm
def test_ranks_are_vllms() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == serve.LORA_RANKS


def test_environment(home: Path) -> None:
    base, adapters = str(home / "base"), ["--adapters", f"sql={home}/team/sql"]
    made = planned(base, *adapters, "--allow-adapters-from", str(home / "plain"))
    assert made.environment[folders.ALLOWED_VARIABLE].split(os.pathsep) == [str(home / "team"), str(home / "plain")]
    assert made.environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_PLUGINS" not in made.environment, "vLLM loads all plugins then"
    assert planned(base, VLLM_PLUGINS="a").environment["VLLM_PLUGINS"] == "a,icarus"
    assert planned(base, VLLM_PLUGINS="").environment["VLLM_PLUGINS"] == "icarus"
    assert "VLLM_PLUGINS" not in planned(base, VLLM_PLUGINS="icarus,a").environment
    assert planned(base, VLLM_USE_V2_MODEL_RUNNER="1").environment["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_data_parallel_engines_have_one_front_end_unless_asked_for_more(home: Path) -> None:
    base = str(home / "base")
    assert value(planned(base, "--data-parallel-size=2"), "--api-server-count") == ["1"]
    assert "--api-server-count" in planned(base, "-dp", "2").flags
    assert "--api-server-count" not in planned(base).flags
    several = planned(base, "--data-parallel-size", "2", "--api-server-count", "2")
    assert several.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0", "vLLM has both at once in no case"
    with pytest.raises(InputError, match="--api-server-count 1"):
        planned(base, "--api-server-count=2", "--adapter-dir", str(home / "team"))


def test_a_folder_makes_room_for_what_it_holds(home: Path, tmp_path: Path) -> None:
    for number in range(9):
        shutil.copytree(home / "team" / "sql", tmp_path / f"a{number}")
    (tmp_path / "a0" / "adapter_model.safetensors").write_text("no")
    made = planned(str(home / "base"), "--adapter-dir", str(tmp_path), "--max-num-seqs", "4")
    assert value(made, "--max-loras") == ["8"], "the sound ones"
    assert made.environment[watch.WATCHED_VARIABLE] == str(tmp_path)
    assert made.environment[folders.ALLOWED_VARIABLE] == str(tmp_path)


BAD = {
    (): "required: BASE",
    ("--port", "8000", "{base}"): "BASE comes before --port",
    ("--adapter-dir", "{home}/team", "--port=8000", "{base}"): "BASE comes before --port",
    ("./nowhere",): "nowhere",
    ("{base}", "--adapters", "sql"): "'sql' is not NAME=PATH",
    ("{base}", "--adapters", "a={home}/plain", "a={home}/plain"): "'a' is given twice",
    ("{base}", "--adapters", "a={home}/nowhere"): "nowhere is no adapter",
    ("{base}", "--adapters", "a={base}"): "is no adapter",
    ("{base}", "--lora-modules", "a=b"): "--adapters NAME=PATH",
    ("{base}", "--adapter-dir", "{home}/nowhere"): "nowhere is no folder",
}


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_need_vllm", lambda: None)
    filled = [word.format(home=home, base=home / "base") for word in words]
    assert cli.main(["serve", *filled]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD[words] in line


def test_an_adapter_of_another_base_model_stops_the_start(home: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=9)
    with pytest.raises(AdapterError, match="trained on another base model"):
        planned(str(other), "--adapters", f"sql={home}/team/sql")


def test_without_vllm_the_remedy_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vllm", "vllm.entrypoints"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve", str(home / "base")]) == 2
    assert "pip install 'icarus-llm[cpu]'" in capsys.readouterr().err


def test_the_announcement(home: Path) -> None:
    words = ["--adapters", f"sql={home}/team/sql", f"plain={home}/plain", "--port", "9000"]
    made = planned(str(home / "base"), *words)
    said = serve.announcement(made, ["--port", "9000"])
    assert "sql    shares it" in said
    assert "plain  its own cache" in said
    assert "http://localhost:9000/metrics" in said
    assert made.adapters[0].base_fingerprint[:12] in said


# ------------------------------------------------------------------------------------------------- folders


def test_paths_are_followed_before_they_are_judged(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "inside-not"
    for folder in (inside / "a", outside / "b"):
        folder.mkdir(parents=True)
    (inside / "leads-out").symlink_to(outside / "b")
    (outside / "leads-in").symlink_to(inside / "a")
    within = [inside.resolve()]
    for path in (inside, inside / "a", outside / "leads-in", inside / "missing"):
        assert folders.permitted(str(path), within) == path.resolve()
    for path in (
        outside / "b",
        inside / "leads-out",
        inside / ".." / "inside-not",
        "owner/name",
        "~",
        "~nobody/x",
        "a\0",
    ):
        assert folders.permitted(str(path), within) is None, path
    assert folders.permitted(str(inside), []) is None


def test_a_hub_id_is_a_folder_below_this_one_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM would download it; as an absolute path it is only a folder that there is not."""
    monkeypatch.chdir(tmp_path)
    assert folders.permitted("owner/name", [tmp_path.resolve()]) == tmp_path.resolve() / "owner" / "name"


def test_a_port_that_is_taken(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match="--port"):
            serve._check_port(["--host", "127.0.0.1", "--port", port])
        serve._check_port(["--uds", "somewhere", "--port", port])


def test_allowed_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(folders.ALLOWED_VARIABLE, raising=False)
    assert folders.allowed() is None
    monkeypatch.setenv(folders.ALLOWED_VARIABLE, "")
    assert folders.allowed() == []
    monkeypatch.setenv(folders.ALLOWED_VARIABLE, f"{tmp_path}{os.pathsep}{tmp_path / 'x'}")
    assert folders.allowed() == [tmp_path.resolve(), tmp_path.resolve() / "x"]


@pytest.mark.parametrize("damage", ["{", '{"r": 0}', '{"r": "8"}', "[]", None])
def test_damaged_conventional_adapters(home: Path, tmp_path: Path, damage: str | None) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(home / "plain", folder)
    assert folders.describe(folder, None) == folders.Described(4, "")
    if damage is None:
        (folder / "adapter_model.safetensors").write_bytes(b"cut")
    else:
        (folder / "adapter_config.json").write_text(damage)
    with pytest.raises(AdapterError):
        folders.describe(folder, None)


# ------------------------------------------------------------------------------------------------- watching


class Follower:
    """A watched folder, and what was called."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, self.refusal = root, list[Any](), ""
        self.failure: Exception | None = None
        root.mkdir()
        self.said: list[str] = []
        self.watcher = watch.Watcher(root, self.load, self.unload, self.said.append)

    async def load(self, name: str, folder: Path, replaces: bool) -> str:
        assert folder == self.root / name
        self.calls.append(("replace" if replaces else "load", name))
        if self.failure:
            raise self.failure
        return self.refusal

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))

    def write(self, name: str, content: str, file: str = "adapter_model.safetensors") -> None:
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / file).write_text(content)

    def complete(self, name: str, content: str = "1") -> None:
        self.write(name, content)
        self.write(name, "{}", "adapter_config.json")

    def look(self, **options: bool) -> list[Any]:
        """What one look does."""
        self.calls = []
        asyncio.run(self.watcher.look(**options))
        return self.calls


@pytest.fixture
def follower(tmp_path: Path) -> Follower:
    return Follower(tmp_path / "adapters")


def test_names_come_and_go_with_folders(follower: Follower) -> None:
    follower.complete("a")
    assert [follower.look() for _ in range(3)] == [[], [("load", "a")], []]
    follower.complete("a", "changed")
    assert [follower.look() for _ in range(3)] == [[], [("replace", "a")], []]
    shutil.rmtree(follower.root / "a")
    assert [follower.look() for _ in range(3)] == [[], [("unload", "a")], []]
    follower.complete("a")
    assert [follower.look() for _ in range(3)] == [[], [("load", "a")], []]
    assert follower.said == []


def test_the_first_look_takes_what_is_there(follower: Follower) -> None:
    follower.complete("b")
    follower.complete("a")
    assert follower.look(first=True) == [("load", "a"), ("load", "b")]
    assert follower.look() == []


def test_half_written_folders_are_ignored(follower: Follower) -> None:
    follower.write("a", "1")
    (follower.root / "file").write_text("")
    assert [follower.look() for _ in range(2)] == [[], []]
    follower.complete("a", "12")
    assert follower.look() == []
    follower.write("a", "123")
    assert [follower.look() for _ in range(2)] == [[], [("load", "a")]]
    follower.complete(".a.0123.tmp")
    assert [follower.look() for _ in range(2)] == [[], []]


def test_a_folder_that_is_swapped_is_not_gone(follower: Follower) -> None:
    follower.complete("a")
    follower.look(first=True)
    (follower.root / "a").rename(follower.root / ".a.old")
    assert follower.look() == []
    (follower.root / ".a.old").rename(follower.root / "a")
    assert [follower.look() for _ in range(2)] == [[], []]


def test_a_refusal_is_said_once_for_each_state(follower: Follower) -> None:
    follower.complete("a")
    follower.look(first=True)
    follower.refusal = "it is of another base model."
    follower.complete("a", "changed")
    assert [follower.look() for _ in range(4)] == [[], [("replace", "a")], [], []]
    assert len(follower.said) == 1
    assert "another base model" in follower.said[0]
    assert "what was loaded before stays" in follower.said[0]
    follower.refusal = ""
    follower.complete("a", "changed again")
    assert [follower.look() for _ in range(2)] == [[], [("replace", "a")]]


def test_what_failed_without_a_word_on_the_adapter_is_tried_again(follower: Follower) -> None:
    follower.complete("a")
    follower.failure = ConnectionError("busy")
    assert [follower.look(first=True), follower.look(), follower.look()] == [[("load", "a")]] * 3
    assert len(follower.said) == 1
    assert "busy" in follower.said[0]
    follower.failure = None
    assert [follower.look() for _ in range(2)] == [[("load", "a")], []]


def test_what_was_never_served_is_not_unloaded(follower: Follower) -> None:
    follower.refusal = "no."
    follower.complete("a")
    follower.look(first=True)
    shutil.rmtree(follower.root / "a")
    assert [follower.look() for _ in range(3)] == [[], [], []]


def test_a_root_that_is_gone_takes_nothing_away(follower: Follower) -> None:
    follower.complete("a")
    follower.look(first=True)
    follower.root.rename(follower.root.with_name("away"))
    assert [follower.look() for _ in range(3)] == [[], [], []]
    assert len(follower.said) == 1
    follower.root.with_name("away").rename(follower.root)
    assert [follower.look() for _ in range(3)] == [[], [], []]


# ------------------------------------------------------------------------------------------------- counters


def blocks(*ids: int) -> list[Any]:
    return [SimpleNamespace(block_id=number, is_null=not number) for number in ids]


def manager(*groups: list[Any]) -> Any:
    pool = SimpleNamespace()
    counting.WRITERS.set(pool, {1: "sql", 2: None})
    return SimpleNamespace(
        block_pool=pool,
        coordinator=SimpleNamespace(get_blocks=lambda request_id: groups),
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16)) for _ in groups]
        ),
        prefix_cache_lookup_enabled=lambda request: True,
    )


def request(lora: str | None, preemptions: int = 0) -> Any:
    named = None if lora is None else SimpleNamespace(lora_name=lora)
    return SimpleNamespace(lora_request=named, request_id="r", num_preemptions=preemptions)


def test_hits_are_counted_by_writer_and_reader() -> None:
    count = counting.wrap_record_prefix_cache_stats(lambda self, request, num_hits: None)
    cache = manager(blocks(1, 2, 1, 3))
    count(cache, request("chat"), 48)
    count(cache, request(None), 16)
    count(cache, request("chat", preemptions=1), 48)
    count(cache, request("chat"), 0)
    assert counting.HITS.get(cache) == Counter({("sql", "chat"): 32, (None, "chat"): 16, ("sql", None): 16})


def test_the_group_with_most_blocks_tells() -> None:
    cache = manager(blocks(0, 0, 1), blocks(2, 2, 2))
    counting.wrap_record_prefix_cache_stats(lambda self, request, num_hits: None)(cache, request("chat"), 48)
    assert counting.HITS.get(cache) == Counter({(None, "chat"): 48})


def test_the_writer_is_whose_request_filled_the_block() -> None:
    write, pool = counting.wrap_cache_full_blocks(lambda *args: None), SimpleNamespace()
    write(pool, request("sql"), blocks(5, 6, 7), 1, 3, 16, 0)
    write(pool, request(None), blocks(5, 6, 7), 0, 1, 16, 0)
    write(pool, request("chat"), blocks(5, 6, 7), 3, 3, 16, 0)
    assert counting.WRITERS.get(pool) == {6: "sql", 7: "sql", 5: None}


def test_loads_and_swaps() -> None:
    core = SimpleNamespace(
        scheduler=SimpleNamespace(
            kv_cache_manager=SimpleNamespace(block_pool=SimpleNamespace(cached_block_hash_to_block=[1, 2, 3]))
        ),
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(served_model_name="base"),
            parallel_config=SimpleNamespace(data_parallel_index=1),
        ),
        model_executor=SimpleNamespace(collective_rpc=lambda method: [method(worker), method(worker)]),
    )
    worker = SimpleNamespace(model_runner=SimpleNamespace())
    for name, number, shares, seconds in (
        ("a", 1, True, 0.02),
        ("b", 2, False, 99),
        ("a", 1, True, 0.3),
        ("b", 2, False, 0),
    ):
        counting.count_load(core, SimpleNamespace(lora_name=name, lora_int_id=number), seconds, shares=shares)
    counters.count_rows(worker.model_runner, 40, 2)
    counters.count_rows(worker.model_runner, 2, 2)
    ask = counting.wrap_collective_rpc(lambda self, method, *args: f"workers: {method}")
    assert ask(core, "other") == "workers: other"
    told = ask(core, counters.READ_COUNTERS)
    assert told["loads"] == {"a": 2, "b": 2}
    assert told["swaps"] == {"a": 1, "b": 1}
    assert told["blocks_kept"] == 3, "of the adapter that shares"
    assert (told["scheduled_rows"], told["decoder_rows"]) == (42, 4)
    assert told["load_buckets"] == [1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert told["engine"] == 1


@needs_vllm
def test_what_prometheus_reads() -> None:
    from icarus.vllm.server import metrics

    engine = {
        "engine": 1,
        "model": "base",
        "hits": [["sql", "base", 64]],
        "scheduled_rows": 42,
        "decoder_rows": 4,
        "loads": {"sql": 2},
        "swaps": {"sql": 1},
        "blocks_kept": 3,
        "load_buckets": [1, 1, *[0] * 9, 1],
        "load_seconds": 31.5,
    }
    text = metrics.exposition([engine, {**engine, "engine": 2}]).decode()
    labels = 'engine="1",model_name="base"'
    assert f'icarus:prefix_hits_tokens_total{{{labels},reader="base",writer="sql"}} 64.0' in text
    assert f"icarus:decoder_rows_total{{{labels}}} 4.0" in text
    assert 'icarus:adapter_load_seconds_bucket{engine="1",le="0.025",model_name="base"} 2.0' in text
    assert f"icarus:adapter_load_seconds_count{{{labels}}} 3.0" in text
    assert 'icarus:decoder_rows_total{engine="2",model_name="base"} 4.0' in text
