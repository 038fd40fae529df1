"""``icarus bench agents`` over HTTP against a fake server: what it sends, measures, keeps, and leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agents_job
import specimens
from icarus import adapter, cli
from icarus.bench import checkpoints
from icarus.bench.agents import load, records
from icarus.bench.agents.server import Server, ServerFailed, free_port
from icarus.bench.agents.workloads import Call, Output, Workflow
from icarus.errors import InputError

JOB = Path(agents_job.__file__)
SHAPES = Path(load.__file__).with_name("shapes") / "llama-3.1-8b-shapes"
SMALL = (
    "--models 2 --workflows 2 --rates 20 --window 0.1 --repeats 1 --workloads react --budgets tight "
    "--systems conventional icarus --turns 4 --task-tokens 24 --system-tokens 8 --output-tokens 3 "
    "--observation-tokens 6 --max-model-len 80 --block-size 4 --rank 2"
).split()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("child")]


def fake(tmp_path: Path, *words: str) -> Server:
    port = free_port()
    command = [sys.executable, str(agents_job.FAKE), "--port", str(port), *words]
    return Server(command, {}, port, tmp_path / "server.log", start_seconds=30)


def measured(output: Path) -> list[records.Run]:
    return records.read(output / records.FILE)[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    specimens.llama().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- load


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fake(tmp_path_factory.mktemp("fake"), "--shared") as server:
        yield server.url


def test_calls_wait_for_those_before_them_and_get_their_tokens(url: str) -> None:
    first = (1, 2, 3)
    chain = Workflow((Call(0, (first,), 2), Call(1, (first, Output(0), (4,)), 3), Call(5, ((9,),), 2, after=(1,))))
    fan = Workflow(tuple(Call(role, ((7, 8),), 20) for role in range(3)))
    run = load.drive(url, [chain, fan], [0.0, 0.3], ["a", "b"])
    one, two, three, *asked = run.calls
    assert [call.model for call in run.calls] == ["a", "b", "b", "a", "b", "a"]
    assert [call.prompt_tokens for call in (one, two, three)] == [3, 6, 1]
    assert [call.output_tokens for call in (one, two, three)] == [2, 3, 2]
    assert two.cached_tokens == 4  # 1 2 3 and the first generated token: generated ids are found again
    assert one.start + one.latency <= two.start
    assert two.start + two.latency <= three.start
    assert max(c.start for c in asked) < min(c.start + c.latency for c in asked)  # all at once
    assert run.arrivals[0] >= 0
    assert run.arrivals[1] >= 0.3
    assert run.arrivals[1] + run.workflows[1] <= run.duration + 0.01
    assert all(c.latency == pytest.approx(c.ttft + sum(c.itls), abs=1e-3) for c in run.calls)
    assert len(run.kv_usage) >= 2
    assert run.cached_tokens == sum(call.cached_tokens for call in run.calls)


def test_a_call_that_fails_ends_the_run(url: str) -> None:
    workflow = Workflow(tuple(Call(role, ((7, 8),), 20) for role in range(3)))
    with pytest.raises(load.CallFailed, match=r"unknown answered 404.*no such model"):
        load.drive(url, [workflow], [0.0], ["unknown"])
    with pytest.raises(load.CallFailed, match="Connect"):
        load.drive(f"http://127.0.0.1:{free_port()}", [workflow], [0.0], ["a"])


# ---------------------------------------------------------------------------------------------- server


def test_a_stopped_server_leaves_no_process(tmp_path: Path) -> None:
    with fake(tmp_path) as server:
        (child,) = wait_for(lambda: children(server.log))
        assert alive(child)
        assert server.peak_bytes() > 1e6
    wait_for(lambda: not alive(child))
    server.stop()  # again is nothing


def test_a_server_that_does_not_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    bad = Server([sys.executable, "-c", "print('no such flag'); raise SystemExit(7)"], {}, 1, tmp_path / "log", 30)
    with pytest.raises(ServerFailed, match=r"(?s)status 7.*log:\n  no such flag"), bad:
        pass
    slow = "import time; print('loading', flush=True); time.sleep(600)"
    late = Server([sys.executable, "-c", slow], {}, free_port(), tmp_path / "log", 1.0)
    with pytest.raises(ServerFailed, match=r"(?s)not healthy after 1 s.*loading"), late:
        pass


# ---------------------------------------------------------------------------------------------- the command


def bench(base: Path, output: Path, *words: str) -> int:
    return cli.main(["bench", "agents", "--base", str(base), "--output", str(output), *SMALL, *words])


def test_the_whole_command_and_what_it_goes_on_with(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agents_job.install(monkeypatch.setattr)
    output = tmp_path / "out"
    assert bench(base, output, "--json", str(tmp_path / "report.json")) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["speedup"]["throughput"] > 0
    assert report["speedup"]["p95"] > 0
    rows = {(row["system"], row["rate"]): row for row in report["runs"]}
    ours, theirs = rows["icarus", None], rows["conventional", None]
    assert ours["total_input_tokens"] == theirs["total_input_tokens"]
    assert ours["total_output_tokens"] == theirs["total_output_tokens"] == 2 * 4 * 3
    assert ours["prompt_tokens_prefilled"] < theirs["prompt_tokens_prefilled"]
    for row in (ours, theirs):
        assert row["prompt_tokens_prefilled"] + row["cached_tokens"] == row["total_input_tokens"]
    printed = capsys.readouterr().out
    assert "budget (tokens): tight" in printed
    assert "a cache for each of 2 models" in printed
    assert (output / "report.md").read_text().startswith("# Agent workflows")
    assert len(measured(output)) == 4

    assert bench(base, output, "--rates", "20", "40") == 0  # one rate more: only that is run
    printed = capsys.readouterr().out
    assert "6 runs, 4 of them measured before" in printed
    assert printed.count(" ... ") == 2

    assert bench(base, output, "--seed", "1") == 2
    assert "another seed: give another --output" in capsys.readouterr().err
    with monkeypatch.context() as changed:
        changed.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
        assert bench(base, output, "--rates", "20", "40", "60") == 2
        assert "another environment: give another --output" in capsys.readouterr().err
    before = (output / "report.json").read_text()
    assert cli.main(["bench", "agents", "--redraw", "--output", str(output)]) == 0
    assert (output / "report.json").read_text() == before
    (tmp_path / "settings.yaml").write_text("models: [2]\n")
    for words in (["--models", "2"], ["--config", str(tmp_path / "settings.yaml")]):
        assert cli.main(["bench", "agents", "--redraw", "--output", str(output), *words]) == 2
        assert f"where {words[0]} has no effect" in capsys.readouterr().err
    for report, said in (
        (before.replace('"turns"', '"rounds"'), "was measured by another version of icarus; draw it with that version"),
        (before.replace('"turns": 4,', ""), "was measured by another version of icarus; draw it with that version"),
        ("{", "holds no report to draw again"),
    ):
        (output / "report.json").write_text(report)
        assert cli.main(["bench", "agents", "--redraw", "--output", str(output)]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_of_version_0_1_0_is_refused_in_one_sentence(tmp_path: Path, capsys: Any) -> None:
    settings = {"base": "smollm2-135m-instruct", "sizes": {"turns": 16}, "serve_flags": []}  # among others
    (tmp_path / "report.json").write_text(json.dumps({"protocol": {"settings": settings}, "failures": []}))
    (tmp_path / "runs.jsonl").write_text(json.dumps({"settings": settings}) + "\n")
    assert cli.main(["bench", "agents", "--redraw", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"icarus: {tmp_path} was measured by another version of icarus; draw it with that version, or measure it again "
        "with another --output.\n"
    )


def test_help_and_redraw_need_no_extra(base: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    agents_job.install(monkeypatch.setattr)
    assert bench(base, tmp_path, "--systems", "icarus", "--rates", "40") == 0
    words = ["bench", "agents", "--redraw", "--output", str(tmp_path)]
    blocked = f"""
import sys
sys.modules |= dict.fromkeys(["aiohttp", "prometheus_client", "matplotlib", "vllm"])
from icarus import cli
assert cli.main({words}) == 0
assert cli.main({words[:2]}) == 2
cli.main(["bench", "agents", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No plots, as matplotlib is missing" in done.stdout
    assert "--max-num-batched-tokens" in done.stdout
    assert "needs more packages (aiohttp); run: pip install 'icarus-llm[bench]'." in done.stderr


def test_a_server_that_dies_is_reported_and_the_others_are_measured(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    agents_job.install(monkeypatch.setattr)
    monkeypatch.setenv("FAKE_DIES", "conventional:12")  # 2 to warm up, 8 of a whole run, and 2
    assert bench(base, tmp_path) == 1
    said = capsys.readouterr().err
    assert "conventional, N=2: The server ended by itself with status 3" in said
    assert "died of thirst" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["system"], row["rate"]) for row in report["runs"]] == [
        ("conventional", None), ("icarus", None), ("icarus", 20.0),
    ]  # fmt: skip
    assert "died of thirst" in report["failures"][0]
    assert "died of thirst" in (tmp_path / "report.md").read_text()
    monkeypatch.delenv("FAKE_DIES")
    assert bench(base, tmp_path) == 0
    assert "4 runs, 3 of them measured before" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_running_and_keeps_what_was_measured(
    base: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = ["bench", "agents", "--base", str(base), "--output", str(tmp_path), *SMALL]
    words += ["--rates", "0.01", "--window", "600"]
    command = subprocess.Popen(
        [sys.executable, str(JOB), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what runs behind
    )
    try:
        log = tmp_path / "logs"
        wait_for(lambda: (tmp_path / records.FILE).exists() and len(measured(tmp_path)) == 1, 90)
        (child,) = children(next(log.iterdir()))
        assert alive(child)
        command.send_signal(number)
        printed, _ = command.communicate(timeout=120)
    finally:
        command.terminate()  # where the test failed; its server ends with it
        command.wait(30)
    assert command.returncode == 130, printed
    wait_for(lambda: not alive(child))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["system"] for row in report["runs"]] == ["conventional"]
    assert "interrupted" in report["failures"][0]
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"icarus-bench-*{command.pid}*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--turns", "0"], "--turns must be a positive integer, not 0"),
        (["--rates", "0"], r"--rates must be a number above 0, not 0\.0"),
        (["--seed", "x"], "--seed.*'x'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--rates", "1", "1"], "--rates is empty or names one twice"),
        (["--systems", "best"], "best"),
        (["--max-model-len", "20"], "A context of react gets .* raise that"),
        (["--tight-tokens", "40"], "does not hold one context of --max-model-len 80"),
        (["--trajectories", "nowhere.jsonl", "--workloads", "plan-act-reflect"], "nowhere.jsonl cannot be read"),
    ],
)
def test_bad_options_are_one_sentence(
    base: Path, tmp_path: Path, words: list[str], message: str, monkeypatch: Any, capsys: Any
) -> None:
    agents_job.install(monkeypatch.setattr)
    if "--trajectories" in words:
        specimens_tokenizer(base)
    assert bench(base, tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert re.search(message, said)


def specimens_tokenizer(folder: Path) -> None:
    """A tokenizer of words, so that recorded text can be encoded."""
    from tiny_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- adapters


def test_adapters_are_made_without_weights_and_fit_the_base(base: Path, tmp_path: Path) -> None:
    checkpoints.make_adapters(base, tmp_path, ["conventional", "icarus"], 2, rank=4, seed=0)
    one, two = (tmp_path / "icarus" / f"agent-{k}" for k in range(2))
    assert adapter.problems(one, base) == []
    assert adapter.verify(one, base).rank == 4
    assert (one / "adapter_model.safetensors").read_bytes() != (two / "adapter_model.safetensors").read_bytes()
    config = json.loads((tmp_path / "conventional" / "agent-0" / "adapter_config.json").read_text())
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} == {
        path.rpartition(".")[2] for path in config["target_modules"]
    }
    assert not adapter.is_icarus(tmp_path / "conventional" / "agent-0")
    from safetensors.torch import load_file

    assert all(tensor.abs().sum() > 0 for tensor in load_file(one / "adapter_model.safetensors").values())


def test_a_stand_in_has_the_shapes_and_takes_no_room(base: Path, tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "config.json").write_bytes((base / "config.json").read_bytes())
    stand_in = checkpoints.stand_in(tmp_path / "shapes", tmp_path / "stand-in")
    from icarus.adapter.fingerprints import checkpoint_shapes

    assert checkpoint_shapes(stand_in) == checkpoint_shapes(base)
    checkpoints.make_adapters(stand_in, tmp_path, ["icarus"], 1, rank=4, seed=0)
    assert adapter.problems(tmp_path / "icarus" / "agent-0", stand_in) == []
    assert adapter.problems(tmp_path / "icarus" / "agent-0", base) != []


def test_kv_bytes_of_a_known_model() -> None:
    assert checkpoints.kv_bytes_per_token(SHAPES, "bfloat16") == 32 * 2 * 8 * 128 * 2


def test_a_missing_base_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        checkpoints.text_config(tmp_path)


def test_the_shapes_are_those_of_the_model_they_are_named_after() -> None:
    sizes = [tensor.numel() for tensor in checkpoints.skeleton(SHAPES).state_dict().values()]
    assert sum(sizes) == 8_030_261_248  # the parameters of Llama-3.1-8B
