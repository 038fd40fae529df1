"""A server with what the benchmark asks of vLLM: streamed completions, /metrics, /health, /reset_prefix_cache.

    python fake_server.py --port P [--shared] [--dies-after N]

Generated ids are a function of the prompt. The prefix cache is told by blocks of 4 tokens, for each model its own or,
with --shared, one for all. It starts a child process, as vLLM does, which must be gone when the server is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys

from aiohttp import web

BLOCK = 4


class Fake:
    def __init__(self, shared: bool, dies_after: int | None) -> None:
        self.shared, self.dies_after = shared, dies_after
        self.blocks: set[tuple[object, ...]] = set()
        self.computed = self.reused = self.calls = self.running = 0

    def prefill(self, model: str, tokens: list[int]) -> int:
        """Puts the blocks of a prompt into the cache; gives how many tokens were there."""
        keys = [("" if self.shared else model, *tokens[:end]) for end in range(BLOCK, len(tokens), BLOCK)]
        cached = next((i for i, key in enumerate(keys) if key not in self.blocks), len(keys)) * BLOCK
        self.blocks.update(keys)
        return cached

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.calls += 1
        if self.dies_after is not None and self.calls > self.dies_after:
            print("the engine core died of thirst", flush=True)
            os._exit(3)
        if asked["model"] == "unknown":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        assert asked["ignore_eos"]
        assert asked["return_token_ids"]
        prompt, length = asked["prompt"], asked["max_tokens"]
        cached = self.prefill(asked["model"], prompt)
        self.reused, self.computed = self.reused + cached, self.computed + len(prompt) - cached
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        generated = [(sum(prompt) + place) % 50 for place in range(length)]
        self.running += 1
        for place, token in enumerate(generated):
            await asyncio.sleep(0.002)
            choice = {"text": "x", "token_ids": [token]}
            event = json.dumps({"choices": [choice]} | ({"usage": None} if place else {})).encode()
            await response.write(b"data: " + event[:5])  # events do not end where packets do
            await response.write(event[5:] + b"\n\n")
        self.running -= 1
        self.prefill(asked["model"], prompt + generated)
        usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": cached}}
        await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text=f"""# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
vllm:prompt_tokens_by_source_total{{engine="0",model_name="base",source="local_compute"}} {float(self.computed)}
vllm:prompt_tokens_by_source_total{{engine="0",model_name="base",source="local_cache_hit"}} {float(self.reused)}
vllm:num_preemptions_total{{engine="0",model_name="base"}} 0.0
vllm:kv_cache_usage_perc{{engine="0",model_name="base"}} {self.running / 10}
"""
        )

    async def reset(self, request: web.Request) -> web.Response:
        self.blocks.clear()
        return web.json_response({"success": self.running == 0})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--dies-after", type=int)
    options = parser.parse_args()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"child {child.pid}", flush=True)
    fake = Fake(options.shared, options.dies_after)
    app = web.Application()
    app.router.add_post("/v1/completions", fake.complete)
    app.router.add_post("/reset_prefix_cache", fake.reset)
    app.router.add_get("/metrics", fake.metrics)
    app.router.add_get("/health", fake.health)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
