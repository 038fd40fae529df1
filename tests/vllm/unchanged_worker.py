"""A worker whose model runner is not the one that the plugin has changed, for engines of tests (``worker_cls``)."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu import model_runner
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class UnchangedWorker(cpu_worker.CPUWorker):  # type: ignore[misc]
    """Has the LoRA manager that the plugin reads adapters with, and vLLM's own functions for everything else."""

    def init_device(self) -> None:
        if self.use_v2_model_runner:
            extended = model_runner.CPUModelRunner
            model_runner.CPUModelRunner = type("UnchangedRunner", (extended.__mro__[2],), {})
        else:
            own: dict[str, Any] = {
                name: function.__wrapped__
                for name, function in vars(GPUModelRunner).items()
                if hasattr(function, "__icarus_patch__")
            }
            cpu_worker.CPUModelRunner = type("UnchangedRunner", (CPUModelRunner,), own)
        super().init_device()
