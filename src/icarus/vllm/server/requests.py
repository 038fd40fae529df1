"""Requests in the front end, before the engine core sees them."""

from __future__ import annotations

from functools import wraps
from inspect import signature
from typing import Any

from vllm.exceptions import VLLMValidationError

from icarus.errors import InputError
from icarus.vllm.engine.attached_policy import policy_of
from icarus.vllm.patching import Original


def wrap_process_inputs(original: Original) -> Original:
    """``InputProcessor.process_inputs``: a request for a refused adapter is the client's error (400).

    An error in the engine core would be the server's (500).
    """
    position = list(signature(original).parameters).index("lora_request")

    @wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.get("lora_request", args[position - 1] if len(args) >= position else None)
        if request is not None and self.lora_config:
            try:
                policy_of(self).decide(request.lora_int_id, request.lora_path)
            except InputError as error:
                raise VLLMValidationError(str(error), parameter="model") from error
        return original(self, *args, **kwargs)

    return process_inputs
