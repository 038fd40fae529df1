"""Runs one engine in a process of its own: a job as JSON on stdin, results as JSON in the file that it names.

A process holds one engine, and its plugins are chosen once (VLLM_PLUGINS), so tests start one for each set of options.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # errors of the core arrive as exceptions

Reply = dict[str, Any]


def ask(llm: Any, adapters: dict[str, dict[str, Any]], requests: list[dict[str, Any]]) -> list[Reply]:
    """One reply for each request; all of them are in the engine together."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    fixed = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    outputs = llm.generate(
        [{"prompt_token_ids": request["prompt"]} for request in requests],
        [SamplingParams(**fixed, **request["sampling"]) for request in requests],
        lora_request=[LoRARequest(**adapters[name]) if (name := r["model"]) != "base" else None for r in requests],
        use_tqdm=False,
    )
    return [reply(output) for output in outputs]


def reply(output: Any) -> Reply:
    """What tests look at."""
    scored = [
        at[token].logprob
        for token, at in zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
        if at is not None
    ]
    return {"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens, "scored": scored}


def load(llm: Any, adapters: dict[str, dict[str, Any]], name: str, **changes: Any) -> bool:
    """Load an adapter, or replace it, as ``/v1/load_lora_adapter`` does; requests then name what was loaded."""
    from vllm.lora.request import LoRARequest

    wanted = {**adapters[name], **changes}
    done: bool = llm.llm_engine.add_lora(LoRARequest(**wanted))
    adapters[name] = wanted
    return done


def main() -> None:
    """Start the engine of the job, take its steps in order, write what came out of each: a result or an error."""
    job = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**job["engine"])
    results = []
    for step in job["steps"]:
        try:
            results.append(
                load(llm, job["adapters"], **step["load"]) if "load" in step else ask(llm, job["adapters"], step["ask"])
            )
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
    Path(job["result"]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
