"""From a model to a page on the Hub: saving folders and writing model cards."""

from hf_vssm_prune.hub.model_card import (
    Evaluation,
    Measurement,
    ModelCardInfo,
    TrainingRecipe,
    create_model_card,
)
from hf_vssm_prune.hub.saving import save_for_hub


__all__ = ["Evaluation", "Measurement", "ModelCardInfo", "TrainingRecipe", "create_model_card", "save_for_hub"]
