"""A model is changed in place, or not at all: after an error it is as it was. PEFT has no way back of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def on_error(model: nn.Module) -> Iterator[None]:
    """Restore modules, the attributes of each, and which parameters are trainable; not the parameters' values."""
    held: dict[int, tuple[Any, Any]] = {}  # every container of every module by identity, and its content
    for attributes in (vars(module) for module in model.modules()):
        for value in (attributes, *attributes.values()):
            if isinstance(value, dict | list | set):
                held[id(value)] = value, copy.copy(value)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for container, content in held.values():
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
