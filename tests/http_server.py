"""``icarus serve`` in a process of its own, with a shop's models, and short ways to ask it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import BLOCK, Shop
from tiny_models import tiny_tokenizer

CONTEXT, SLOTS, QUEUE = 384, 8, 20
LETTERS = list(range(4, 128))  # tokens that are text


class Server:
    """A running server and short ways to ask it."""

    def __init__(self, shop: Shop, watched: Path, *more: str, **variables: str) -> None:
        from httpx import Client  # both come with vLLM
        from openai import OpenAI

        self.shop, self.watched = shop, watched
        self.log, self.temporary = shop.folder / "server.log", shop.folder / "temporary"
        self.temporary.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        adapters = [f"{name}={shop.folder / name}" for name in ("sql", "chat")]
        words = ["serve", str(shop.base), "--adapters", *adapters, "--adapters", f"plain={shop.folder / 'plain'}"]
        words += ["--adapter-dir", str(watched), "--served-model-name", "base", "--host", "127.0.0.1"]
        words += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm"]
        words += ["--block-size", str(BLOCK), "--max-model-len", str(CONTEXT), "--max-num-seqs", str(SLOTS)]
        words += ["--max-num-queued-reqs", str(QUEUE), "--seed", "0"]
        words += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", *more]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **variables}
        environment.pop("VLLM_PLUGINS", None)
        environment |= {"TMPDIR": str(self.temporary), "VLLM_RPC_BASE_PATH": tempfile.gettempdir()}  # of short sockets
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "icarus.cli", *words], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.http = Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.openai = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)

    def wait(self) -> None:
        from httpx import TransportError

        for _ in range(600):
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except TransportError:
                assert self.process.poll() is None, self.log.read_text()[-5000:]
            time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-5000:])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def close(self) -> None:
        """Nothing of it stays, however the test ended."""
        for client in (self.http, self.openai):
            client.close()
        self.process.kill()
        self.process.wait(60)

    def ask(self, model: str, prompt: list[int], **options: Any) -> tuple[list[int], int]:
        """Generated tokens and cached tokens of one greedy request."""
        reply = self.post("/v1/completions", **body(model, prompt, **options)).json()
        return reply["choices"][0]["token_ids"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    def post(self, path: str, **content: Any) -> Any:
        return self.http.post(path, json=content)

    def load(self, name: str, folder: Path, **options: Any) -> Any:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **options)

    def copies(self) -> int:
        """Files without a name that the workers keep: two for each copy of an adapter."""
        import psutil  # comes with vLLM

        links = (
            os.readlink(link)
            for process in psutil.Process(self.process.pid).children(recursive=True)
            for link in Path(f"/proc/{process.pid}/fd").iterdir()
            if link.is_symlink()
        )
        return sum(link.startswith(str(self.temporary)) and link.endswith("(deleted)") for link in links)

    def models(self) -> dict[str, Any]:
        return {card["id"]: card for card in self.http.get("/v1/models").json()["data"]}

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all samples of a metric with these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            if match := re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line):
                sample = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if match[1] == name and labels.items() <= sample.items():
                    total += float(match[3])
        return total


def body(model: str, prompt: Any, **options: Any) -> dict[str, Any]:
    fixed = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": model, "prompt": prompt, **fixed, **options}


def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.2)


@contextmanager
def serving(folder: Path, *more: str, **variables: str) -> Iterator[Server]:
    """A server of a shop in ``folder`` that is ready, and that must end well."""
    shop = Shop(folder)
    tiny_tokenizer().save_pretrained(shop.base)
    shutil.copytree(folder / "chat", folder / "watched" / "early")
    server = Server(shop, folder / "watched", *more, **variables)
    try:
        server.wait()
        yield server
        assert server.stop() == 0, server.log.read_text()[-5000:]
        assert not list(server.temporary.glob("icarus-adapter-*")), "a server takes its copies with it"
    finally:
        server.close()
