"""Training: data -> rows with loss -> TRL's trainer over two streams -> an adapter directory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icarus.train.config import IcarusDistillationConfig
    from icarus.train.distillation import IcarusDistillationTrainer
    from icarus.train.trainer import IcarusSFTTrainer

_HOMES = {
    "IcarusDistillationConfig": "config",
    "IcarusDistillationTrainer": "distillation",
    "IcarusSFTTrainer": "trainer",
}

__all__ = ["IcarusDistillationConfig", "IcarusDistillationTrainer", "IcarusSFTTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'icarus.train' has no attribute {name!r}")
    return getattr(import_module(f"icarus.train.{_HOMES[name]}"), name)
