"""Runs one engine in a process of its own: a job as JSON on stdin, results as JSON in the file that it names.

A process holds one engine, and its plugins are chosen once (VLLM_PLUGINS), so tests start one for each set of options.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # errors of the core arrive as exceptions

Reply = dict[str, Any]


def answer(llm: Any, adapters: dict[str, dict[str, Any]], batch: list[dict[str, Any]]) -> list[Reply]:
    """One reply for each request of a batch; all of them are in the engine together."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [{"prompt_token_ids": request["prompt"]} for request in batch]
    loras = [LoRARequest(**adapters[request["model"]]) if request["model"] != "base" else None for request in batch]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False,
            prompt_logprobs=request.get("prompt_logprobs"),
        )
        for request in batch
    ]  # fmt: skip
    try:
        outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    except Exception as error:
        return [{"error": f"{type(error).__name__}: {error}"} for _ in batch]
    return [{"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens} for o in outputs]


def main() -> None:
    """Start the engine of the job, answer its batches in order, write what came out."""
    job = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**job["engine"])
    replies = [answer(llm, job["adapters"], batch) for batch in job["batches"]]
    Path(job["result"]).write_text(json.dumps(replies), encoding="utf-8")


if __name__ == "__main__":
    main()
