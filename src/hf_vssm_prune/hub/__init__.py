"""From a model to a page on the Hub: saving folders, writing model cards, pushing."""

from hf_vssm_prune.hub.model_card import (
    Evaluation,
    Measurement,
    ModelCardInfo,
    TrainingRecipe,
    create_model_card,
)
from hf_vssm_prune.hub.pushing import push_model
from hf_vssm_prune.hub.saving import save_for_hub


__all__ = [
    "Evaluation",
    "Measurement",
    "ModelCardInfo",
    "TrainingRecipe",
    "create_model_card",
    "push_model",
    "save_for_hub",
]
