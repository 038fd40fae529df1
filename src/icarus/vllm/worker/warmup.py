"""What a worker runs before it serves, where the room for decoder rows would only cost memory.

Each ``wrap_`` function takes a method of vLLM and returns its replacement; see ledger.py.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor

from icarus.vllm.patching import Original


def wrap_dummy_sampler_run(original: Original) -> Original:
    """``_dummy_sampler_run``: samples for as many requests as may run, and not for their decoder requests as well.

    Its logits have a row for each request, of the size of the vocabulary, and the memory that it takes at most is what
    the KV cache does not get.
    """

    @wraps(original)
    def _dummy_sampler_run(self: Any, hidden_states: Tensor) -> Any:
        active = self.scheduler_config.max_num_active_seqs
        return original(self, hidden_states if active is None else hidden_states[:active])

    return _dummy_sampler_run
