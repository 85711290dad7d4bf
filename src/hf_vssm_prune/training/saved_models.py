"""How a run's models are written, with card and picture; the loop only says when."""

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

# From the metrics of a model and the number of images that they are of, what its card says.
WriteCard = Callable[[dict[str, float], int], ModelCardInfo]


class SavedModels:
    """Writes models as folders that `from_pretrained` opens.

    Args:
        task: draws the picture of a pruned model.
        image_processor: is saved with each.
        items: of the evaluation; some of them are in the picture.
        write_card: None: a card says no more than what the model itself tells.
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
        """Writes a model, which one process can run by itself."""
        card = self.write_card and self.write_card(metrics, len(self.items))
        with tempfile.TemporaryDirectory() as scratch:
            if card is not None and (picture := self.draw(model)) is not None:
                picture.save(Path(scratch) / PICTURE)
                card = replace(card, picture=Path(scratch) / PICTURE)
            save_for_hub(model, folder, self.image_processor, card)

    def draw(self, model: PrunableModel) -> Image.Image | None:
        """The task's picture of a pruned model; None of a dense one."""
        if pruned_config(model.config).token_pruning is None:
            return None
        # Spread over the images, which may be in the order of their labels.
        step = max(1, len(self.items) // PICTURED_IMAGES)
        items = [self.items[index] for index in range(0, len(self.items), step)[:PICTURED_IMAGES]]
        # What random importance draws here must not change what comes after.
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return self.task.draw(model, self.image_processor, self.task.collate(items))
