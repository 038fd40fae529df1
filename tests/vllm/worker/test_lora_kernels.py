"""vLLM's LoRA kernels for GPUs with base, decoder and padded rows, by Triton's interpreter.

The interpreter is switched on when Triton is imported, so the kernels run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from engines import INTERPRETED
from strict_skips import needs_vllm

ROWS, PADDED, WIDTH, RANK, OUTPUTS = 14, 2, 64, 8, 96
BASE, DECODED = [0] * 11, [5, 7, 7]  # LoRA ids: scheduled rows on base weights, and decoder rows of two adapters
SLOTS = {7: 0, 5: 2}


def run_kernels() -> None:
    """Each kind of rows through the product that every layer takes, and the logits' for a step that samples."""
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    torch.manual_seed(0)
    config: Any = SimpleNamespace(max_loras=3, specialize_active_lora=False)
    wrapper = PunicaWrapperGPU(64, 16, "cpu", lora_config=config)
    a, b = torch.randn(3, 1, RANK, WIDTH).half(), torch.randn(3, 1, OUTPUTS, RANK).half()
    ids = [*BASE, *DECODED]
    wrapper.update_metadata(LoRAMapping(tuple(ids), (0, 5, 7), True), [7, None, 5], 3, 1000)
    x, before = torch.randn(ROWS + PADDED, WIDTH).half(), torch.randn(ROWS + PADDED, OUTPUTS).half()
    y = before.clone()
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (OUTPUTS,))
    untouched = [*range(len(BASE)), *range(ROWS, ROWS + PADDED)]
    assert torch.equal(y[untouched], before[untouched]), "rows without an adapter, and padding"
    for row, lora_id in enumerate(DECODED, len(BASE)):
        slot = SLOTS[lora_id]
        wanted = before[row].float() + x[row].float() @ a[slot, 0].float().T @ b[slot, 0].float().T
        torch.testing.assert_close(y[row].float(), wanted, atol=0.3, rtol=0.02)
        assert (y[row] - before[row]).abs().max() > 1, "the adapter of the row"


@needs_vllm
def test_rows_without_an_adapter_keep_their_bits_and_decoder_rows_get_theirs() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    paths = os.pathsep.join([str(INTERPRETED), *filter(None, sys.path)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "VLLM_PLUGINS": "", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the kernels ran" in done.stdout


if __name__ == "__main__":
    run_kernels()
    print("the kernels ran")
