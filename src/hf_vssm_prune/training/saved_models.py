"""Saves a run's models with card and picture; the loop decides when."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers import BaseImageProcessor

from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.hub.model_card import ModelCardInfo
from hf_vssm_prune.hub.saving import save_for_hub
from hf_vssm_prune.training.tasks.task import EvaluationItems, PrunableModel, Task


PICTURE = "kept_tokens.png"
PICTURED_IMAGES = 4

# From a model's metrics and the number of evaluated images to the content of its card.
WriteCard = Callable[[dict[str, float], int], ModelCardInfo]


class SavedModels:
    """Saves models as folders that can be loaded with `from_pretrained`.

    Args:
        task: draws the picture of a pruned model.
        image_processor: saved with each model.
        items: items of the evaluation; some of them are shown in the picture.
        write_card: creates the content of the model card; None: the card contains only information from the model
            itself.
    """

    def __init__(
        self,
        task: Task,
        image_processor: BaseImageProcessor,
        items: EvaluationItems,
        write_card: WriteCard | None = None,
    ) -> None:
        self.task = task
        self.image_processor = image_processor
        self.items = items
        self.write_card = write_card

    def save(self, model: PrunableModel, folder: Path, metrics: dict[str, float]) -> None:
        """Saves a model that a single process can run."""
        card = self.write_card and self.write_card(metrics, len(self.items))
        with tempfile.TemporaryDirectory() as scratch:
            if card is not None and (picture := self.draw(model)) is not None:
                picture.save(Path(scratch) / PICTURE)
                card = replace(card, picture=Path(scratch) / PICTURE)
            save_for_hub(model, folder, self.image_processor, card)

    def draw(self, model: PrunableModel) -> Image.Image | None:
        """The task's picture of a pruned model; None for a dense model."""
        if pruned_config(model.config).token_pruning is None:
            return None
        # Spread over the data set, because images may be sorted by label.
        step = max(1, len(self.items) // PICTURED_IMAGES)
        items = [self.items[index] for index in range(0, len(self.items), step)[:PICTURED_IMAGES]]
        # Random numbers drawn here (random importance) must not affect later draws.
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return self.task.draw(model, self.image_processor, self.task.collate(items))
