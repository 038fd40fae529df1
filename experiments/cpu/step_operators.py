"""Operator calls and copies of a decode step of vLLM in which every request is a specialist's.

    python -m experiments.cpu.step_operators --runner V2 --json results/cpu-step-operators/V2.json

An engine decodes for the shipped specialists, in this process; model runner V2 runs by Triton's interpreter. Once all
requests decode, steps run under torch.profiler: some as they are, and as many of which each is planned anew, as if none
were laid out like the last one. On a GPU each array that is sent to the device is a copy through pinned memory. On a
CPU it is none, so these are counted where vLLM is asked for them.
"""

from __future__ import annotations

import os
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

from icarus import arguments, base_model
from icarus.bench import measure
from icarus.shipped_specialists import shipped

INTERPRETED = Path(__file__).parents[2] / "tests" / "interpreted" / "sitecustomize.py"
WARM = 4  # steps in which all requests decode, before any is counted
COPIES = ("aten::copy_", "aten::clone", "aten::cat", "aten::index", "aten::index_put_", "aten::fill_")


def prepare(runner: str) -> None:
    """What has to be set before vLLM is imported."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="icarus", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner == "V2" else "0"
    if runner == "V2":
        os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")
        runpy.run_path(str(INTERPRETED))


def count_sent(sent: Counter[str]) -> None:
    """Count the arrays that the plugin sends to the device from here on."""
    from icarus.vllm.worker import planned

    original = vars(planned)["async_tensor_h2d"]

    def async_tensor_h2d(*args: Any, **kwargs: Any) -> Any:
        sent["plugin"] += 1
        return original(*args, **kwargs)

    vars(planned)["async_tensor_h2d"] = async_tensor_h2d


def engine(requests: int) -> Any:
    """An engine in which that many requests decode, those of the specialists in turn."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=str(base_model.folder("smollm2-135m-wikisql")),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=requests,
        enable_lora=True,
        max_loras=3,
        max_lora_rank=32,
    )
    adapters = [LoRARequest(name, n, str(path)) for n, (name, path) in enumerate(shipped().items(), 1)]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=200, detokenize=False)
    for n in range(requests):
        prompt = {"prompt_token_ids": [100 + n, *range(200, 220)]}
        llm.llm_engine.add_request(str(n), prompt, params, lora_request=adapters[n % len(adapters)])
    for _ in range(WARM):
        llm.llm_engine.step()
    return llm.llm_engine


def count(running: Any, steps: int, sent: Counter[str], *, anew: bool) -> dict[str, Any]:
    """Calls in a step, on average."""
    from torch.profiler import ProfilerActivity, profile

    from icarus.vllm.worker.planned import Planner

    kept = Planner.plan

    def plan(self: Planner, batch: Any) -> Any:
        self._last = None
        return kept(self, batch)

    sent.clear()
    if anew:
        Planner.plan = plan  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            running.step()
    Planner.plan = kept  # type: ignore[method-assign]
    calls = {event.key: event.count / steps for event in profiled.key_averages() if event.key.startswith("aten::")}
    return {
        "operator calls": sum(calls.values()),
        "of them": {name: calls.get(name, 0.0) for name in COPIES},
        "arrays sent to the device": {by: number / steps for by, number in sorted(sent.items())},
    }


def main() -> None:
    """Print the counts, and write them if asked to."""
    parser = arguments.Parser(description=__doc__)
    parser.add_argument("--runner", choices=("V1", "V2"), default="V2")
    parser.add_argument("--requests", type=arguments.positive_int, default=6)
    parser.add_argument("--steps", type=arguments.positive_int, default=10)
    arguments.add_json(parser)
    options = parser.parse_args()
    prepare(options.runner)
    running, sent = engine(options.requests), Counter[str]()
    count_sent(sent)
    results = {
        name: count(running, options.steps, sent, anew=anew)
        for name, anew in (("as it is", False), ("planned anew", True))
    }
    report = {"settings": measure.settings(**vars(options)), "results": results}
    print(results)
    if options.json:
        arguments.write_json(report, options.json)


if __name__ == "__main__":
    main()
