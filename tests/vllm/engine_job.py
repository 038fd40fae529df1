"""Runs engines, each in a process of its own: jobs as lines of JSON on stdin, results as JSON in the file a job names.

A process holds one engine, and its plugins are chosen once (VLLM_PLUGINS), so tests start one for each set of options.
All are forked from a process that has imported vLLM and has done nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from safetensors.torch import load_file

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # errors of the core arrive as exceptions

IMPORTED = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.models.llama",
)
"""What takes most of the time to import, without the plugin."""

Reply = dict[str, Any]


def ask(llm: Any, adapters: dict[str, dict[str, Any]], requests: list[dict[str, Any]]) -> list[Reply]:
    """One reply for each request; all of them are in the engine together."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    fixed = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    outputs = llm.generate(
        [prompt(llm, request) for request in requests],
        [SamplingParams(**{**fixed, **request["sampling"]}) for request in requests],
        lora_request=[LoRARequest(**adapters[name]) if (name := r["model"]) != "base" else None for r in requests],
        use_tqdm=False,
    )
    return [reply(output) for output in outputs]


def prompt(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """A prompt as token ids, or as their embeddings."""
    if not request.get("embedded"):
        return {"prompt_token_ids": request["prompt"]}
    weights = load_file(Path(llm.llm_engine.vllm_config.model_config.model) / "model.safetensors")
    return {"prompt_embeds": weights["model.embed_tokens.weight"][request["prompt"]]}


def reply(output: Any) -> Reply:
    """What tests look at."""
    first = output.outputs[0]
    scored = [
        at[token].logprob
        for token, at in zip(output.prompt_token_ids or [], output.prompt_logprobs or [], strict=False)
        if at is not None
    ]
    sampled = [at[token].logprob for token, at in zip(first.token_ids, first.logprobs or [], strict=False)]
    return {
        "tokens": list(first.token_ids),
        "choices": [list(choice.token_ids) for choice in output.outputs],
        "cached": output.num_cached_tokens,
        "scored": scored,
        "sampled": sampled,
    }


def load(llm: Any, adapters: dict[str, dict[str, Any]], name: str, **changes: Any) -> bool:
    """Load an adapter, or replace it, as ``/v1/load_lora_adapter`` does; requests then name what was loaded."""
    from vllm.lora.request import LoRARequest

    wanted = {**adapters[name], **changes}
    done: bool = llm.llm_engine.add_lora(LoRARequest(**wanted))
    adapters[name] = wanted
    return done


def written(llm: Any, adapters: dict[str, dict[str, Any]], requests: list[dict[str, Any]]) -> list[Reply]:
    """Requests one after another: which blocks each used, and what is in the full ones, layer by layer."""
    core = llm.llm_engine.engine_core.engine_core
    blocks: list[int] = []
    schedule = core.scheduler.schedule

    def watched(*args: Any) -> Any:
        output = schedule(*args)
        for name in output.num_scheduled_tokens:
            blocks[:] = core.scheduler.kv_cache_manager.get_block_ids(name)[0]
        return output

    core.scheduler.schedule = watched
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    replies = []
    for request in requests:
        [answer] = ask(llm, adapters, [request])
        held = len(request["prompt"]) + len(answer["tokens"]) - 1  # the last token is never an input
        full = blocks[: held // llm.llm_engine.vllm_config.cache_config.block_size]
        # (2, blocks, heads, block, size) or (blocks, 2, ...): the number of blocks tells.
        count = core.scheduler.kv_cache_config.num_blocks
        content = [cache.select(cache.shape.index(count), block) for cache in caches for block in full]
        digest = [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() for part in content]
        replies.append({**answer, "blocks": full, "content": digest})
    core.scheduler.schedule = schedule
    return replies


def published(llm: Any, adapters: dict[str, dict[str, Any]], requests: list[dict[str, Any]]) -> list[Reply]:
    """The adapters that KV events name for the blocks that requests store."""
    publisher = llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher
    events: list[Any] = []
    publisher.publish = lambda batch: events.extend(batch.events)
    replies = []
    for request in requests:
        events.clear()
        ask(llm, adapters, [request])
        stored = [event for event in events if type(event).__name__ == "BlockStored"]
        replies.append({"stored": len(stored), "adapters": [[event.lora_id, event.lora_name] for event in stored]})
    return replies


def counted(llm: Any, adapters: dict[str, dict[str, Any]], name: str) -> float:
    """One of vLLM's counters."""
    return float(next(metric.value for metric in llm.get_metrics() if metric.name == name))


def set_min_paired_keys(worker: Any, keys: int) -> None:
    """In a worker, which may be a process of its own."""
    from icarus.vllm.cpu import attention as cpu_attention

    cpu_attention.MIN_PAIRED_KEYS = keys


def set_temporary(worker: Any, spoiled: list[int]) -> None:
    """In a worker, which may be a process of its own."""
    tempfile.tempdir = "/nowhere" if worker.rank in spoiled else None


def spoil(llm: Any, adapters: dict[str, dict[str, Any]], ranks: list[int]) -> None:
    """These workers, and no others, cannot write temporary files from now on."""
    llm.collective_rpc(set_temporary, args=(ranks,))


def open_files(worker: Any) -> int:
    """Of a worker."""
    return len(os.listdir("/dev/fd"))


def count_files(llm: Any, adapters: dict[str, dict[str, Any]], given: None) -> list[int]:
    """Files that each worker has open."""
    counts: list[int] = llm.collective_rpc(open_files)
    return counts


def cancel(llm: Any, adapters: dict[str, dict[str, Any]], request: dict[str, Any]) -> int:
    """Take a request back after some steps of the engine; returns how many tokens it had sampled."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine, sampled = llm.llm_engine, 0
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=100)
    lora = LoRARequest(**adapters[request["model"]])
    name = engine.add_request("taken back", prompt(llm, request), params, lora_request=lora)
    for _ in range(request["steps"]):
        sampled += sum(len(output.outputs[0].token_ids) for output in engine.step())
    engine.abort_request([name])
    while engine.has_unfinished_requests():
        engine.step()
    return sampled


def delete(llm: Any, adapters: dict[str, dict[str, Any]], folder: str) -> None:
    """Take away what an adapter was loaded from."""
    shutil.rmtree(folder)


def sample_scheduled_rows(llm: Any, adapters: dict[str, dict[str, Any]], given: None) -> None:
    """From now on this engine samples from scheduled rows, as if there were no decoder rows."""
    from icarus.vllm import step_layout

    step_layout.predicting_rows = step_layout.scheduled_rows


def as_on_a_gpu() -> None:
    """Have buffers on the device that are not those on the host, and let steps be scheduled ahead of their results.

    vLLM's CPU runner makes the two one, and its CPU platform turns asynchronous scheduling off.
    """
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    CPUModelRunner._postprocess_tensors = lambda self: None
    check = CpuPlatform.check_and_update_config.__func__  # the plugin looks at its parameters

    @wraps(check)
    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    torch.cuda.Event = torch.cuda.current_stream = MagicMock  # of a device that has done its work at once
    torch.cuda.stream = lambda stream: nullcontext()


def check_as_on_a_gpu(llm: Any) -> None:
    """It would be a pity to test the ordinary engine again."""
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    buffers = [runner.input_ids, runner.query_start_loc, runner.input_batch.block_table.block_tables[0].block_table]
    assert all(buffer.gpu.data_ptr() != buffer.cpu.data_ptr() for buffer in buffers)


def attend_with_triton() -> None:
    """Have layers use vLLM's Triton backend, as on GPUs; on CPUs its interpreter runs the kernels."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    torch.cuda.get_device_capability = lambda *args: (9, 0)  # the kernel that writes K/V asks
    CpuPlatform.get_attn_backend_cls = lambda *args, **kwargs: AttentionBackendEnum.TRITON_ATTN.get_path()


def count_pairs(llm: Any, adapters: dict[str, dict[str, Any]], given: None) -> None:
    """From now on, see how many pairs of rows are attended together."""
    from icarus.vllm import step_layout

    found, pairs = PAIRS, step_layout.pairs

    def watched(*args: Any) -> Any:
        first, second = pairs(*args)
        found.append(len(first))
        return first, second

    step_layout.pairs = watched


PAIRS: list[int] = []


def counted_pairs(llm: Any, adapters: dict[str, dict[str, Any]], given: None) -> list[int]:
    """Of each step since then."""
    return PAIRS


ACTIONS = {
    "count pairs": count_pairs,
    "counted pairs": counted_pairs,
    "sample scheduled rows": sample_scheduled_rows,
    "ask": ask,
    "written": written,
    "published": published,
    "counted": counted,
    "cancel": cancel,
    "delete": delete,
    "spoil": spoil,
    "files": count_files,
}


def run(job: dict[str, Any]) -> None:
    """Start the engine of the job, take its steps in order, write what came out of each: a result or an error."""
    os.environ.update(job["environment"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from vllm import LLM

    if job["as_on_a_gpu"]:
        as_on_a_gpu()
    if job["triton_attention"]:
        attend_with_triton()
    llm = LLM(**job["engine"])
    if job["as_on_a_gpu"]:
        check_as_on_a_gpu(llm)
    llm.collective_rpc(set_min_paired_keys, args=(job["min_paired_keys"],))
    results = []
    for step in job["steps"]:
        try:
            [(action, given)] = step.items()
            adapters = job["adapters"]
            results.append(load(llm, adapters, **given) if action == "load" else ACTIONS[action](llm, adapters, given))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
    Path(job["result"]).write_text(json.dumps(results), encoding="utf-8")


def main() -> None:
    """Run each job in a process forked from this one; print the exit status of each."""
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            return run(job)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
