"""Evaluation: the base model, conventional adapters and ICaRus adapters answer the same items.

* ``sides``: who answers, and how each kind of adapter is run; ``generated``: what it says, token by token
* ``tasks``, ``task_files``: what is asked and what is right; the same as YAML
* ``scorers``: from an answer to a score; ``sandbox`` and ``jail`` run those that are programs
* ``run``: each side over each item
* ``command``: ``icarus eval``, with ``records`` and ``report``
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icarus.evaluate.generated import Answer
    from icarus.evaluate.run import Outcome, evaluate
    from icarus.evaluate.sides import Scored, Side, Sides, TokenRow
    from icarus.evaluate.task_files import read as read_task
    from icarus.evaluate.tasks import Item, Task

_HOMES = {
    "Answer": "generated",
    "Item": "tasks",
    "Outcome": "run",
    "Scored": "sides",
    "Side": "sides",
    "Sides": "sides",
    "Task": "tasks",
    "TokenRow": "sides",
    "evaluate": "run",
    "read_task": "task_files",
}

__all__ = ["Answer", "Item", "Outcome", "Scored", "Side", "Sides", "Task", "TokenRow", "evaluate", "read_task"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'icarus.evaluate' has no attribute {name!r}")
    module = import_module(f"icarus.evaluate.{_HOMES[name]}")
    return module.read if name == "read_task" else getattr(module, name)
