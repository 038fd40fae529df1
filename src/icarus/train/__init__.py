"""Training: data -> rows with loss -> TRL's trainer over two streams -> an adapter directory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icarus.train.trainer import IcarusSFTTrainer

__all__ = ["IcarusSFTTrainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'icarus.train' has no attribute {name!r}")
    from icarus.train import trainer

    return getattr(trainer, name)
