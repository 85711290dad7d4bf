"""Semantic segmentation: each pixel has one class, or none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from hf_vssm_prune.configuration_common import FEATURE_NORMS, pruned_config
from hf_vssm_prune.feature_pyramid import PYRAMIDS
from hf_vssm_prune.precision import at_least_float32
from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.arguments.parsing import check_range, describe
from hf_vssm_prune.training.data import ImageDatasets
from hf_vssm_prune.training.data.mask_items import (
    EvaluationMasks,
    StreamedTrainingMasks,
    TrainingMasks,
    collate_masks,
)
from hf_vssm_prune.training.data.segmentation import (
    MaskOptions,
    PairStream,
    load_segmentation_datasets,
    load_segmentation_evaluation,
)
from hf_vssm_prune.training.losses import distillation_loss
from hf_vssm_prune.training.mask_augmentation import MaskAugmentation
from hf_vssm_prune.training.segmentation_models import SegmentationHead, SegmentationModels, segmentation_processor
from hf_vssm_prune.training.sliding_window import slide, window_boxes
from hf_vssm_prune.training.tasks.dense_task import DenseTask, check_levels, check_scale, height_width
from hf_vssm_prune.training.tasks.task import Batch, PrunableModel, Scores
from hf_vssm_prune.visualization import image_statistics
from hf_vssm_prune.visualization_of_heads import draw_segmentation


@dataclass
class MaskArguments:
    """Format of the masks, and how images are segmented in an evaluation."""

    label_file: str | None = field(
        default=None,
        metadata=describe(
            "class names: JSON, or text with one name per line; by default those in the data set", "--id2label"
        ),
    )
    ignore_index: int = field(default=255, metadata=describe("mask value of pixels that belong to no class"))
    reduce_labels: bool = field(
        default=False,
        metadata=describe(
            "treat mask value 0 as no class, and count classes from 1 (as in ADE20K)", "--do_reduce_labels"
        ),
    )
    window: list[int] | None = field(
        default=None,
        metadata=describe(
            "height and width of a window that slides over each image; by default, images are evaluated as a whole"
        ),
    )
    window_stride: list[int] | None = field(
        default=None, metadata=describe("stride of the sliding window; by default, two thirds of --window")
    )
    size_divisor: int = field(
        default=1,
        metadata=describe("stretch images so that their sides are multiples of this number (PlainMamba uses 32)"),
    )

    def __post_init__(self) -> None:
        check_range("ignore_index", self.ignore_index, 0, 2**31)
        check_range("size_divisor", self.size_divisor, 1, 2**16)
        if self.reduce_labels and self.ignore_index != 255:
            raise ValueError(
                f"--ignore_index is {self.ignore_index}: with --reduce_labels, which turns 0 into 255, it must be 255."
            )
        if self.window_stride is not None and self.window is None:
            raise ValueError("--window_stride needs a --window.")
        for name in ("window", "window_stride"):
            if (value := getattr(self, name)) is not None:
                height_width(name, value)
        if (windows := self.windows()) and any(step > side for side, step in zip(*windows, strict=True)):
            raise ValueError(
                f"--window_stride is {self.window_stride}: it must be at most --window {self.window}, or windows would "
                "leave gaps."
            )

    def masks(self) -> MaskOptions:
        return MaskOptions(self.label_file, self.ignore_index, self.reduce_labels)

    def windows(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The sliding window's (height, width) and stride; None: images are segmented as a whole."""
        if self.window is None:
            return None
        window = height_width("window", self.window)
        if self.window_stride is not None:
            return window, height_width("window_stride", self.window_stride)
        return window, (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3))


@dataclass
class SegmentationHeadArguments:
    """Options of a new head."""

    head_channels: int = field(
        default=SegmentationHead.channels, metadata=describe("number of channels of a new decode head")
    )
    auxiliary_channels: int = field(
        default=SegmentationHead.auxiliary_channels, metadata=describe("number of channels of a new auxiliary head")
    )
    levels: list[int] | None = field(
        default=None,
        metadata=describe(
            "layers, counted from 1, whose outputs a new head uses; default: at each quarter of the depth"
        ),
    )
    feature_norm: str = field(
        default=SegmentationHead.feature_norm,
        metadata=describe("how the outputs of --levels are normalised", choices=FEATURE_NORMS),
    )
    feature_pyramid: str | None = field(
        default=None,
        metadata=describe(
            "how feature maps of several sizes are computed from --levels; default: none", choices=(*PYRAMIDS,)
        ),
    )

    def __post_init__(self) -> None:
        for name in ("head_channels", "auxiliary_channels"):
            check_range(name, getattr(self, name), 1, 2**16)
        check_levels(self.levels)


@dataclass
class SegmentationArguments(SegmentationHeadArguments, MaskArguments):
    """Format of the masks, options of a new head, and augmentation of the images."""

    crop_size: list[int] = field(
        default_factory=lambda: [512], metadata=describe("height and width of training crops, or one number")
    )
    scale: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata=describe("smallest and largest factor by which training images are scaled"),
    )
    hflip: float = field(default=0.5, metadata=describe("probability of a horizontal flip"))
    no_photometric_distortion: bool = field(
        default=False, metadata=describe("do not change brightness, contrast, saturation and hue")
    )
    most_of_a_class: float = field(
        default=0.75, metadata=describe("draw another crop if one class covers more than this fraction of it")
    )
    short_side: int | None = field(
        default=None,
        metadata=describe(
            "resize the shorter side to this many pixels (longer side: at most 4 times as many); by default, do not "
            "resize"
        ),
    )

    def __post_init__(self) -> None:
        SegmentationHeadArguments.__post_init__(self)
        MaskArguments.__post_init__(self)
        check_range("short_side", self.short_side, 1, 2**16)
        check_scale(self.scale)
        self.augmentation()

    def augmentation(self) -> MaskAugmentation:
        return MaskAugmentation(
            crop_size=height_width("crop_size", self.crop_size),
            scale=(self.scale[0], self.scale[-1]),
            horizontal_flip=self.hflip,
            photometric_distortion=not self.no_photometric_distortion,
            most_of_a_class=self.most_of_a_class,
        )

    def new_head(self) -> SegmentationHead:
        return SegmentationHead(
            self.head_channels,
            self.auxiliary_channels,
            None if self.levels is None else tuple(self.levels),
            self.feature_norm,
            self.feature_pyramid,
            self.ignore_index,
            height_width("crop_size", self.crop_size),
        )


class SemanticSegmentation(DenseTask):
    """The model's own cross-entropy over labelled pixels, evaluated by mean intersection over union; see `task.Task`.

    A batch has "pixel_values" (batch, channels, height, width) and "labels", class ids (batch, height, width). In an
    evaluation, both are lists if images differ in size. The scores of a batch are (batch, 3, classes), pixels counted
    by `metrics.mean_iou.mean_iou.label_areas`.

    Args:
        arguments: options for training, or for an evaluation.
    """

    name: ClassVar[str] = "semantic-segmentation"
    auto_class: ClassVar[Any] = SegmentationModels()
    training_arguments: ClassVar[type] = SegmentationArguments
    evaluation_arguments: ClassVar[type] = MaskArguments
    head_arguments: ClassVar[type] = SegmentationHeadArguments
    metric_for_best_model: ClassVar[str] = "mean_iou"
    greater_is_better: ClassVar[bool] = True
    shown_metrics: ClassVar[Mapping[str, tuple[str, str]]] = {
        "mean_iou": ("mIoU", ".2%"),
        "mean_accuracy": ("mean accuracy", ".2%"),
        "overall_accuracy": ("pixel accuracy", ".2%"),
    }

    def __init__(self, arguments: MaskArguments | None = None) -> None:
        self.arguments = arguments or SegmentationArguments()
        self._training = arguments if isinstance(arguments, SegmentationArguments) else SegmentationArguments()
        self.auto_class = SegmentationModels(self._training.new_head())  # type: ignore[misc]

    # Data

    def load_datasets(self, data: DataArguments, seed: int) -> ImageDatasets:
        return load_segmentation_datasets(data, self.arguments.masks(), seed)

    def load_evaluation_dataset(self, data: EvaluationDataArguments, seed: int) -> tuple[Any, Sequence[str]]:
        return load_segmentation_evaluation(data, self.arguments.masks(), seed)

    def training_items(self, rows: Any, image_processor: BaseImageProcessor, seed: int) -> TrainingMasks:
        kind = StreamedTrainingMasks if isinstance(rows, PairStream) else TrainingMasks
        return kind(rows, image_processor, self._training.masks(), self._training.augmentation(), seed)

    def evaluation_items(self, rows: Any, image_processor: BaseImageProcessor) -> EvaluationMasks:
        return EvaluationMasks(rows, image_processor, self.arguments.masks(), self.arguments.size_divisor)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        return collate_masks(items)

    def example_batch(self, config: Any, batch_size: int, device: torch.device) -> Batch:
        height, width = self._training.augmentation().crop_size
        shape = (batch_size, pruned_config(config).num_channels, height, width)
        labels = torch.randint(config.num_labels, (batch_size, height, width), device=device)
        return {"pixel_values": torch.randn(shape, device=device), "labels": labels}

    def image_processor(self, image_processor: BaseImageProcessor) -> BaseImageProcessor:
        """The image processor of a model in training, created from the checkpoint's."""
        return segmentation_processor(image_processor, self._training.short_side)

    # Training

    def inputs(self, batch: Batch) -> dict[str, Any]:
        labels = batch["labels"]
        if not self._has_labels(labels):
            # The model's loss is a mean over labelled pixels, which would be 0 / 0; `losses` multiplies this one by 0.
            # All parameters still get a gradient, for which other processes wait.
            labels = torch.full_like(labels, 1 if self.arguments.ignore_index == 0 else 0)
        return {"pixel_values": batch["pixel_values"], "labels": labels}

    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"segmentation": at_least_float32(outputs.loss) * self._has_labels(batch["labels"])}

    def _has_labels(self, labels: Tensor) -> Tensor:
        return (labels != self.arguments.ignore_index).any()

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """Averaged over all pixels, labelled or not."""
        student_logits, teacher_logits = (each.logits.movedim(1, -1).flatten(0, -2) for each in (student, teacher))
        return distillation_loss(student_logits, teacher_logits, temperature)

    # Evaluation

    def predict(self, model: PrunableModel, batch: Batch) -> Any:
        """Outputs whose `logits` are (batch, classes, height, width), or a list of (classes, height, width)."""
        images = batch["pixel_values"]
        windows = self.arguments.windows()
        if windows is None and isinstance(images, Tensor):
            return model(pixel_values=images)
        if windows is None:
            return SimpleNamespace(logits=[model(pixel_values=image.unsqueeze(0)).logits[0] for image in images])
        return SimpleNamespace(
            logits=[
                slide(lambda part: model(pixel_values=part).logits, image.unsqueeze(0), *windows)[0] for image in images
            ]
        )

    def parts(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """The (height, width) of each of the windows in which `predict` looks at an image of this size."""
        if (windows := self.arguments.windows()) is None:
            return [image_size]
        return [(bottom - top, right - left) for top, left, bottom, right in window_boxes(image_size, *windows)]

    def scores(self, outputs: Any, batch: Batch) -> Scores:
        return torch.stack(
            [
                self._areas(segment(logits, labels.shape), labels, num_labels=logits.shape[0])
                for logits, labels in zip(outputs.logits, batch["labels"], strict=True)
            ]
        )

    def metrics(self, scores: Sequence[Scores]) -> dict[str, float]:
        from hf_vssm_prune.metrics.mean_iou.mean_iou import iou_from_areas

        areas = torch.cat(list(scores)).sum(dim=0).numpy()  # type: ignore[arg-type]
        if not areas[2].any():
            raise ValueError("No pixel of the evaluated masks has a class, so there is nothing to compare with.")
        metrics = iou_from_areas(areas)
        return {name: metrics[name] for name in self.shown_metrics}

    def _areas(self, predicted: Tensor, labels: Tensor, num_labels: int) -> Tensor:
        # The metric imports `evaluate`, which takes a second and is installed only with the training extra.
        from hf_vssm_prune.metrics.mean_iou.mean_iou import label_areas

        areas = label_areas(predicted.cpu().numpy(), labels.cpu().numpy(), num_labels, self.arguments.ignore_index)
        return torch.from_numpy(areas).to(predicted.device)

    # Pictures

    def draw(self, model: PrunableModel, image_processor: BaseImageProcessor, batch: Batch) -> Image.Image:
        images = batch["pixel_values"]
        first = images[:1] if isinstance(images, Tensor) else images[0].unsqueeze(0)
        return draw_segmentation(model, first, *image_statistics(image_processor))


def segment(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Class ids (height, width) of the given size, from logits (classes, height, width) of any size."""
    logits = at_least_float32(logits).unsqueeze(0)
    if logits.shape[-2:] != tuple(size):
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    return logits[0].argmax(dim=0)
