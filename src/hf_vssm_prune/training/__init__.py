"""Training and fine-tuning: data, augmentation, losses, the loop, and a subclass of transformers' `Trainer`."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_vssm_prune.training.trainer import TokenPruningTrainer

__all__ = ["TokenPruningTrainer"]


def __getattr__(name: str) -> Any:
    """Imports the trainer, and Accelerate with it, only on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_vssm_prune.training.trainer import TokenPruningTrainer

    return TokenPruningTrainer
