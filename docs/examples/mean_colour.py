"""A toy task: the mean colour of an image, as three numbers from 0 to 1. The smaller the error, the better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_vssm_prune.training.augmentation import AugmentationConfig
from hf_vssm_prune.training.data import (
    EvaluationImages,
    ImageDatasets,
    ImageStream,
    StreamedTrainingImages,
    TrainingImages,
    collate,
    load_evaluation_dataset,
    load_image_dataset,
    load_image_stream,
)
from hf_vssm_prune.training.models import load_model, load_teacher
from hf_vssm_prune.training.tasks.task import NoArguments


CHANNELS = ["red", "green", "blue"]


@dataclass
class MeanColourArguments:
    """Augmentation of the training images."""

    noise: float = field(default=0.0, metadata={"help": "standard deviation of what is added to the pixels"})


class MeanColour:
    """A batch has "pixel_values" (batch, 3, height, width) and "colours" (batch, 3)."""

    name: ClassVar[str] = "mean-colour"
    auto_class: ClassVar[Any] = AutoModelForImageClassification  # three outputs are all that it takes
    training_arguments: ClassVar[type] = MeanColourArguments
    evaluation_arguments: ClassVar[type] = NoArguments
    metric_for_best_model: ClassVar[str] = "rmse"
    greater_is_better: ClassVar[bool] = False
    shown_metrics: ClassVar[Mapping[str, tuple[str, str]]] = {"rmse": ("RMSE", ".4f")}

    def __init__(self, arguments: Any = None) -> None:
        self.arguments = arguments if isinstance(arguments, MeanColourArguments) else MeanColourArguments()

    def load_datasets(self, data, seed):
        load = load_image_stream if data.streaming else load_image_dataset
        datasets = load(data.dataset_name, max_train_samples=data.max_train_samples, seed=seed)
        return ImageDatasets(datasets.train, datasets.evaluation, CHANNELS)

    def load_evaluation_dataset(self, data, seed):
        rows, _ = load_evaluation_dataset(data.dataset_name, split=data.eval_split, seed=seed)
        return rows, CHANNELS

    def training_items(self, rows, image_processor, seed):
        kind = StreamedTrainingImages if isinstance(rows, ImageStream) else TrainingImages
        plain = AugmentationConfig(random_resized_crop_scale=None, randaugment_num_ops=0, random_erasing=0.0)
        return kind(rows, image_processor, plain, seed)

    def evaluation_items(self, rows, image_processor):
        return EvaluationImages(rows, image_processor)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pixel_values = collate(items)["pixel_values"]
        return {"pixel_values": pixel_values, "colours": pixel_values.mean(dim=(2, 3))}

    def example_batch(self, config, batch_size, device):
        height, width = config.image_height_width(config.image_size)
        pixel_values = torch.rand(batch_size, 3, height, width, device=device)
        return {"pixel_values": pixel_values, "colours": pixel_values.mean(dim=(2, 3))}

    load_model = staticmethod(load_model)
    load_teacher = staticmethod(load_teacher)

    def mix(self, batch, config, generator: np.random.Generator):
        noise = generator.standard_normal(batch["pixel_values"].shape, dtype=np.float32)
        noise = torch.from_numpy(noise).to(batch["pixel_values"].device)
        return {**batch, "pixel_values": batch["pixel_values"] + self.arguments.noise * noise}

    def inputs(self, batch):
        return {"pixel_values": batch["pixel_values"]}

    def losses(self, outputs, batch):
        return {"squared_error": F.mse_loss(outputs.logits.float(), batch["colours"])}

    def distillation(self, student, teacher, temperature):
        return F.mse_loss(student.logits.float(), teacher.logits.detach().float())

    def scores(self, outputs, batch) -> Tensor:
        return (outputs.logits.float() - batch["colours"]).square().mean(dim=1)

    def metrics(self, scores: Sequence[Tensor]) -> dict[str, float]:
        return {"rmse": torch.cat(list(scores)).double().mean().sqrt().item()}

    def draw(self, model, image_processor, batch):
        return None

    def evaluation_on_card(self, metrics, num_images, dataset_name, split, pruned):
        return None
