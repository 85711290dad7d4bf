"""Image classification: each image has one label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification, BaseImageProcessor

from hf_vssm_prune.configuration_common import VisionMambaConfig, has_head
from hf_vssm_prune.hub.loading import load_config
from hf_vssm_prune.hub.model_card import Evaluation
from hf_vssm_prune.metrics import load_metric
from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.arguments.parsing import describe
from hf_vssm_prune.training.augmentation import AugmentationConfig, MixConfig, mix_batch
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
from hf_vssm_prune.training.data.media import IMAGES, Medium
from hf_vssm_prune.training.losses import cross_entropy, distillation_loss
from hf_vssm_prune.training.models import load_model, load_teacher
from hf_vssm_prune.training.tasks.task import Batch, NoArguments, PrunableModel, Scores, evaluation_of_task
from hf_vssm_prune.visualization import draw_classification, image_statistics


# ImageNet results are usually reported as top-1 and top-5 accuracy.
NUM_GUESSES = 5
SCALE = [0.08, 1.0]  # DeiT's


@dataclass
class AugmentationArguments:
    """Augmentation of the training images."""

    _argument_group_name = "augmentation"

    scale: list[float] = field(
        default_factory=lambda: list(SCALE),
        metadata=describe("minimum and maximum area of a random resized crop, as fractions"),
    )
    random_crop_padding: int | None = field(
        default=None,
        metadata=describe("padding in pixels for random crops of small images, instead of --scale"),
    )
    no_random_crop: bool = field(default=False, metadata=describe("disable random crops"))
    hflip: float = field(default=0.5, metadata=describe("probability of a horizontal flip"))
    randaugment_num_ops: int = field(default=2, metadata=describe("RandAugment operations per image; 0 turns it off"))
    randaugment_magnitude: float = field(default=9.0, metadata=describe("magnitude of RandAugment, 0 to 10"))
    reprob: float = field(default=0.25, metadata=describe("probability of random erasing", "--random_erasing"))
    mixup: float = field(default=0.8, metadata=describe("mixup alpha; 0 turns mixup off"))
    cutmix: float = field(default=1.0, metadata=describe("CutMix alpha; 0 turns CutMix off"))
    mixup_prob: float = field(default=1.0, metadata=describe("probability of applying mixup or CutMix to a batch"))
    mixup_switch_prob: float = field(
        default=0.5, metadata=describe("probability of CutMix instead of mixup if both are on")
    )
    smoothing: float = field(default=0.1, metadata=describe("label smoothing", "--label_smoothing"))

    def __post_init__(self) -> None:
        if self.no_random_crop and self.random_crop_padding:
            raise ValueError("--no_random_crop and --random_crop_padding cannot be combined: give one of them.")
        if (self.no_random_crop or self.random_crop_padding is not None) and self.scale != SCALE:
            name = "no_random_crop" if self.no_random_crop else "random_crop_padding"
            raise ValueError(f"--scale and --{name} cannot be combined: give one of them.")
        if len(self.scale) != 2:
            raise ValueError(f"--scale is {self.scale}: give the smallest and the largest fraction.")
        self.image_augmentation()
        self.mix()

    def image_augmentation(self) -> AugmentationConfig:
        no_resized_crop = self.no_random_crop or self.random_crop_padding is not None
        return AugmentationConfig(
            random_resized_crop_scale=None if no_resized_crop else (self.scale[0], self.scale[1]),
            random_crop_padding=self.random_crop_padding or 0,
            horizontal_flip=self.hflip,
            randaugment_num_ops=self.randaugment_num_ops,
            randaugment_magnitude=self.randaugment_magnitude,
            random_erasing=self.reprob,
        )

    def mix(self) -> MixConfig:
        return MixConfig(self.mixup, self.cutmix, self.mixup_prob, self.mixup_switch_prob, self.smoothing)


class ImageClassification:
    """Cross-entropy with mixup and CutMix, evaluated by top-1 and top-5 accuracy; see `task.Task`.

    A batch has "pixel_values" (batch, channels, height, width) and "labels": class ids (batch,) or, after mixing,
    probabilities (batch, labels). The scores of a batch are (batch, 7), see `score_predictions`.

    Args:
        arguments: options for augmentation and mixing; not needed for an evaluation.
    """

    name: ClassVar[str] = "image-classification"
    medium: ClassVar[Medium] = IMAGES
    auto_class: ClassVar[Any] = AutoModelForImageClassification
    training_arguments: ClassVar[type] = AugmentationArguments
    evaluation_arguments: ClassVar[type] = NoArguments
    metric_for_best_model: ClassVar[str] = "top1"
    greater_is_better: ClassVar[bool] = True
    shown_metrics: ClassVar[Mapping[str, tuple[str, str]]] = {"top1": ("top-1", ".2%"), "top5": ("top-5", ".2%")}

    def __init__(self, arguments: AugmentationArguments | NoArguments | None = None) -> None:
        self.arguments = arguments if isinstance(arguments, AugmentationArguments) else AugmentationArguments()

    # Data

    def load_datasets(self, data: DataArguments, seed: int) -> ImageDatasets:
        options: dict[str, Any] = {
            "config_name": data.dataset_config_name,
            "train_split": data.train_split,
            "eval_split": data.eval_split,
            "image_column": data.image_column_name,
            "label_column": data.label_column_name,
            "max_train_samples": data.max_train_samples,
            "max_eval_samples": data.max_eval_samples,
            "seed": seed,
            "medium": self.medium,
        }
        if data.streaming:
            return load_image_stream(data.dataset_name, shuffle_buffer_size=data.shuffle_buffer_size, **options)
        return load_image_dataset(data.dataset_name, validation_share=data.train_val_split, **options)

    def load_evaluation_dataset(self, data: EvaluationDataArguments, seed: int) -> tuple[Any, Sequence[str]]:
        return load_evaluation_dataset(
            data.dataset_name,
            config_name=data.dataset_config_name,
            split=data.eval_split,
            image_column=data.image_column_name,
            label_column=data.label_column_name,
            max_samples=data.max_eval_samples,
            seed=seed,
            medium=self.medium,
        )

    def training_items(self, rows: Any, image_processor: BaseImageProcessor, seed: int) -> TrainingImages:
        kind = StreamedTrainingImages if isinstance(rows, ImageStream) else TrainingImages
        return kind(rows, image_processor, self.arguments.image_augmentation(), seed)

    def evaluation_items(self, rows: Any, image_processor: BaseImageProcessor) -> EvaluationImages:
        return EvaluationImages(rows, image_processor)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        return collate(items)

    def example_batch(self, config: VisionMambaConfig, batch_size: int, device: torch.device) -> Batch:
        return {
            "pixel_values": torch.randn(config.pixel_values_shape(batch_size), device=device),
            "labels": torch.randint(len(config.label_names), (batch_size,), device=device),
        }

    # Models

    def load_model(self, name_or_path: str, label_names: Sequence[str], *args: Any, **options: Any) -> PrunableModel:
        self._check_model(name_or_path)
        return load_model(name_or_path, label_names, *args, **options)

    def load_teacher(self, name_or_path: str, *args: Any, **options: Any) -> PrunableModel:
        self._check_model(name_or_path)
        return load_teacher(name_or_path, *args, **options)

    def _check_model(self, name_or_path: str) -> None:
        config = load_config(name_or_path)
        if has_head(config) or config.modality != self.medium.name:
            kind = f"{config.model_type!r} model" if has_head(config) else f"model for {config.modality}s"
            raise ValueError(
                f"{name_or_path} is a {kind}; --task {self.name} needs a classifier of {self.medium.name}s."
            )

    # Training

    def mix(self, batch: Batch, config: VisionMambaConfig, generator: np.random.Generator) -> Batch:
        pixel_values, labels = mix_batch(
            batch["pixel_values"], batch["labels"], len(config.label_names), self.arguments.mix(), generator
        )
        return {**batch, "pixel_values": pixel_values, "labels": labels}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        # Without labels, because the model's own loss would treat soft labels as several labels per image.
        return {"pixel_values": batch["pixel_values"]}

    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"cross_entropy": cross_entropy(outputs.logits, batch["labels"])}

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        return distillation_loss(student.logits, teacher.logits, temperature)

    # Evaluation

    def scores(self, outputs: Any, batch: Batch) -> Tensor:
        return score_predictions(outputs.logits, batch["labels"])

    def metrics(self, scores: Sequence[Scores]) -> dict[str, float]:
        of_images = torch.cat(list(scores)).double()  # type: ignore[arg-type]
        loss, labels, guesses = of_images[:, 0], of_images[:, 1].long(), of_images[:, 2:].long()
        accuracy = load_metric("top_k_accuracy").compute(
            predictions=guesses.numpy(), references=labels.numpy(), k=[1, NUM_GUESSES]
        )
        return {**accuracy, "loss": loss.mean().item()}

    # Pictures

    def draw(self, model: PrunableModel, image_processor: BaseImageProcessor, batch: Batch) -> Image.Image:
        return draw_classification(model, batch["pixel_values"], *image_statistics(image_processor))

    def evaluation_on_card(
        self, metrics: Mapping[str, float], num_images: int, dataset_name: str, split: str, pruned: bool
    ) -> Evaluation:
        return evaluation_of_task(self, metrics, num_images, dataset_name, split, pruned)


def score_predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """For each image, its cross-entropy, its label, and the predicted labels, most likely first, padded with -1.

    Args:
        logits: (batch, labels).
        labels: class ids (batch,).

    Returns:
        float32 (batch, 2 + NUM_GUESSES). It represents ids below 16 million exactly, and MPS does not support float64.
    """
    logits = logits.float()
    guesses = logits.topk(min(NUM_GUESSES, logits.shape[-1]), dim=-1).indices
    guesses = F.pad(guesses, (0, NUM_GUESSES - guesses.shape[-1]), value=-1)
    loss = F.cross_entropy(logits, labels, reduction="none")
    return torch.cat([loss.unsqueeze(-1), labels.unsqueeze(-1), guesses], dim=-1).float()
