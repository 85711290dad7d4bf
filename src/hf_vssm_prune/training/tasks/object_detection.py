"""Object detection: each image has objects, each with a box and a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from hf_vssm_prune.configuration_common import FEATURE_NORMS, has_head, pruned_config
from hf_vssm_prune.detections import find_objects
from hf_vssm_prune.feature_pyramid import PYRAMIDS
from hf_vssm_prune.hub.loading import load_config
from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.arguments.parsing import check_range, describe
from hf_vssm_prune.training.average_precision import average_precision
from hf_vssm_prune.training.box_augmentation import BoxAugmentation
from hf_vssm_prune.training.data import ImageDatasets, ImageStream
from hf_vssm_prune.training.data.box_items import EvaluationBoxes, StreamedTrainingBoxes, TrainingBoxes, collate_boxes
from hf_vssm_prune.training.data.dense_items import fixed_size
from hf_vssm_prune.training.data.detection import ObjectOptions, load_detection_datasets, load_detection_evaluation
from hf_vssm_prune.training.detection_losses import detection_distillation, loss_per_box
from hf_vssm_prune.training.detection_models import (
    CHANNELS_DIVISOR,
    HEADS,
    NEW_DETECTORS_SIZE,
    DetectionHead,
    DetectionModels,
    check_size,
    detection_processor,
)
from hf_vssm_prune.training.tasks.dense_task import DenseTask, check_levels, check_scale, height_width
from hf_vssm_prune.training.tasks.task import Batch, PrunableModel, Scores
from hf_vssm_prune.visualization import image_statistics
from hf_vssm_prune.visualization_of_heads import draw_detection


@dataclass
class BoxArguments:
    """Format of the objects."""

    label_file: str | None = field(
        default=None,
        metadata=describe(
            "class names: JSON, or text with one name per line; by default those in the data set", "--id2label"
        ),
    )
    box_format: str = field(
        default="coco",
        metadata=describe(
            "`coco`: left, top, width, height in pixels; `corners`: left, top, right, bottom",
            choices=("coco", "corners"),
        ),
    )

    def objects(self) -> ObjectOptions:
        return ObjectOptions(self.label_file, self.box_format == "corners")


@dataclass
class DetectionHeadArguments:
    """Options of a new head."""

    head: str = field(default=DetectionHead.kind, metadata=describe("head of a new model", choices=tuple(HEADS)))
    head_channels: int = field(default=DetectionHead.channels, metadata=describe("number of channels of a new head"))
    head_ffn_channels: int = field(
        default=DetectionHead.ffn_channels, metadata=describe("number of channels in a new head's feed-forward layers")
    )
    head_attention_heads: int = field(
        default=DetectionHead.attention_heads, metadata=describe("number of attention heads of a new head")
    )
    encoder_layers: int | None = field(
        default=None, metadata=describe("encoder layers of a new head; default: 1 for RT-DETR, 6 for Deformable DETR")
    )
    decoder_layers: int = field(default=DetectionHead.decoder_layers, metadata=describe("decoder layers of a new head"))
    num_queries: int = field(
        default=DetectionHead.num_queries,
        metadata=describe("queries of a new head: the maximum number of objects that it detects in an image"),
    )
    num_denoising: int = field(
        default=DetectionHead.num_denoising,
        metadata=describe(
            "number of noisy copies of labelled boxes that RT-DETR also learns to restore; 0 turns this off"
        ),
    )
    levels: list[int] | None = field(
        default=None,
        metadata=describe(
            "layers, counted from 1, whose outputs a new head uses; default: three for RT-DETR, the last for "
            "Deformable DETR"
        ),
    )
    feature_norm: str = field(
        default=DetectionHead.feature_norm,
        metadata=describe("how the outputs of --levels are normalised", choices=FEATURE_NORMS),
    )
    feature_pyramid: str | None = field(
        default=None,
        metadata=describe(
            "how feature maps of several sizes are computed from --levels; default for RT-DETR: simple",
            choices=(*PYRAMIDS,),
        ),
    )

    def __post_init__(self) -> None:
        positive = ("head_channels", "head_ffn_channels", "head_attention_heads", "decoder_layers", "num_queries")
        for name in (*positive, "encoder_layers"):
            check_range(name, getattr(self, name), 1, 2**16)
        check_range("num_denoising", self.num_denoising, 0, 2**16)
        if self.head_channels % self.head_attention_heads:
            raise ValueError(
                f"--head_channels is {self.head_channels}: it must be a multiple of --head_attention_heads "
                f"{self.head_attention_heads}."
            )
        if self.head_channels % (multiple := CHANNELS_DIVISOR[self.head]):
            raise ValueError(f"--head_channels is {self.head_channels}: {self.head} needs a multiple of {multiple}.")
        if self.head == "deformable_detr" and self.decoder_layers == 1:
            raise ValueError("--decoder_layers is 1: transformers' deformable_detr needs at least 2.")
        check_levels(self.levels)


@dataclass
class DetectionArguments(DetectionHeadArguments, BoxArguments):
    """Format of the objects, options of a new head, and augmentation of the images."""

    input_size: list[int] | None = field(
        default=None,
        metadata=describe(
            "height and width to which all images are resized, or one number; default: the detector's, or 640 for a "
            "new one"
        ),
    )
    scale: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata=describe(
            "smallest and largest factor by which training images are scaled before they are cropped or padded to "
            "--input_size"
        ),
    )
    hflip: float = field(default=0.5, metadata=describe("probability of a horizontal flip"))
    vflip: float = field(default=0.0, metadata=describe("probability of a vertical flip"))
    no_photometric_distortion: bool = field(
        default=False, metadata=describe("do not change brightness, contrast, saturation and hue")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale)
        self.augmentation(self.size() or NEW_DETECTORS_SIZE)

    def size(self) -> tuple[int, int] | None:
        return None if self.input_size is None else height_width("input_size", self.input_size)

    def augmentation(self, size: tuple[int, int]) -> BoxAugmentation:
        return BoxAugmentation(
            size=size,
            scale=(self.scale[0], self.scale[-1]),
            horizontal_flip=self.hflip,
            vertical_flip=self.vflip,
            photometric_distortion=not self.no_photometric_distortion,
        )

    def new_head(self) -> DetectionHead:
        return DetectionHead(
            kind=self.head,
            channels=self.head_channels,
            ffn_channels=self.head_ffn_channels,
            attention_heads=self.head_attention_heads,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            num_queries=self.num_queries,
            num_denoising=self.num_denoising,
            levels=None if self.levels is None else tuple(self.levels),
            feature_norm=self.feature_norm,
            feature_pyramid=self.feature_pyramid,
            image_size=self.size() or NEW_DETECTORS_SIZE,
        )


class ObjectDetection(DenseTask):
    """The detector's own loss over matched boxes, evaluated by COCO's average precision; see `task.Task`.

    A batch has "pixel_values" (batch, channels, height, width) and, for training, "labels" or, for evaluation,
    "objects": lists of the entries of `TrainingBoxes` or `EvaluationBoxes`. The scores of an image are arrays, see
    `scores`.

    Args:
        arguments: options for training, or for an evaluation.
    """

    name: ClassVar[str] = "object-detection"
    auto_class: ClassVar[Any] = DetectionModels()
    training_arguments: ClassVar[type] = DetectionArguments
    evaluation_arguments: ClassVar[type] = BoxArguments
    head_arguments: ClassVar[type] = DetectionHeadArguments
    # In a batch without boxes, RT-DETR has no denoising queries and does not use its class embeddings.
    idle_parameters: ClassVar[bool] = True
    metric_for_best_model: ClassVar[str] = "map"
    greater_is_better: ClassVar[bool] = True
    shown_metrics: ClassVar[Mapping[str, tuple[str, str]]] = {
        "map": ("mAP", ".2%"),
        "map_50": ("mAP50", ".2%"),
        "map_75": ("mAP75", ".2%"),
    }

    def __init__(self, arguments: BoxArguments | None = None) -> None:
        self.arguments = arguments or DetectionArguments()
        self._training = arguments if isinstance(arguments, DetectionArguments) else DetectionArguments()
        self.auto_class = DetectionModels(self._training.new_head())  # type: ignore[misc]

    # Data

    def load_datasets(self, data: DataArguments, seed: int) -> ImageDatasets:
        return load_detection_datasets(data, self.arguments.objects(), seed)

    def load_evaluation_dataset(self, data: EvaluationDataArguments, seed: int) -> tuple[Any, Sequence[str]]:
        return load_detection_evaluation(data, self.arguments.objects(), seed)

    def training_items(self, rows: Any, image_processor: BaseImageProcessor, seed: int) -> TrainingBoxes:
        kind = StreamedTrainingBoxes if isinstance(rows, ImageStream) else TrainingBoxes
        return kind(rows, image_processor, self._training.augmentation(fixed_size(image_processor)), seed)

    def evaluation_items(self, rows: Any, image_processor: BaseImageProcessor) -> EvaluationBoxes:
        return EvaluationBoxes(rows, image_processor)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        return collate_boxes(items)

    def example_batch(self, config: Any, batch_size: int, device: torch.device) -> Batch:
        backbone = pruned_config(config)
        height, width = self._training.size() or (backbone.input_size if has_head(config) else NEW_DETECTORS_SIZE)
        shape = (batch_size, backbone.num_channels, height, width)
        box = torch.tensor([[0.5, 0.5, 0.2, 0.2]], device=device)
        label = torch.randint(config.num_labels, (1,), device=device)
        corners = torch.tensor([[0.4 * width, 0.4 * height, 0.6 * width, 0.6 * height]], device=device)
        objects = {
            "boxes": corners,
            "labels": label,
            "crowd": torch.zeros(1, dtype=torch.bool, device=device),
            "size": torch.tensor([height, width], device=device),
        }
        return {
            "pixel_values": torch.randn(shape, device=device),
            "labels": [{"class_labels": label, "boxes": box}] * batch_size,
            "objects": [objects] * batch_size,
        }

    def image_processor(self, image_processor: BaseImageProcessor) -> BaseImageProcessor:
        """The image processor of a model in training, created from the checkpoint's."""
        return detection_processor(image_processor, self._training.size())

    # Models

    def load_model(self, name_or_path: str, *args: Any, **options: Any) -> PrunableModel:
        config = load_config(name_or_path)
        if has_head(config):
            check_size(config.model_type, self._training.size())
        return super().load_model(name_or_path, *args, **options)

    # Training

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: batch[name] for name in ("pixel_values", "labels") if name in batch}

    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"detection": loss_per_box(outputs, batch["labels"])}

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        return detection_distillation(student, teacher, temperature)

    # Evaluation

    def scores(self, outputs: Any, batch: Batch) -> Scores:
        """For each image, {"detections": (n, 6), "objects": (n, 6), "num_labels"}; see `average_precision`."""
        sizes = torch.stack([each["size"] for each in batch["objects"]])
        return [
            {
                "detections": found.rows().cpu().numpy(),
                "objects": _as_rows(objects),
                "num_labels": outputs.logits.shape[-1],
            }
            for found, objects in zip(find_objects(outputs, sizes), batch["objects"], strict=True)
        ]

    def metrics(self, scores: Sequence[Scores]) -> dict[str, float]:
        images = [each for of_batch in scores for each in of_batch]
        return average_precision(
            [each["detections"] for each in images],
            [each["objects"] for each in images],
            images[0]["num_labels"],
        )

    # Pictures

    def draw(self, model: PrunableModel, image_processor: BaseImageProcessor, batch: Batch) -> Image.Image:
        return draw_detection(model, batch["pixel_values"], *image_statistics(image_processor))


def _as_rows(objects: Mapping[str, Tensor]) -> np.ndarray:
    columns = [objects["boxes"], objects["labels"][:, None], objects["crowd"][:, None]]
    return torch.cat([column.float() for column in columns], dim=1).cpu().numpy()
