"""Video classification: each video has one label."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import AutoModelForVideoClassification, BaseImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from hf_vssm_prune.precision import at_least_float32
from hf_vssm_prune.training.arguments.parsing import check_range, describe
from hf_vssm_prune.training.data.clips import EvaluationClips, StreamedTrainingClips, TrainingClips, Views
from hf_vssm_prune.training.data.columns import ImageStream
from hf_vssm_prune.training.data.media import VIDEOS, Medium
from hf_vssm_prune.training.frame_sampling import SAMPLINGS
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification
from hf_vssm_prune.training.tasks.task import Batch, PrunableModel


@dataclass
class ViewArguments:
    """The parts of a video that are evaluated."""

    frame_sampling: str = field(
        default="uniform",
        metadata=describe(
            "how evaluation samples frames: `uniform` over the video (Kinetics), or one from each of as many "
            "segments (Something-Something)",
            choices=tuple(SAMPLINGS),
        ),
    )
    num_clips: int = field(default=1, metadata=describe("clips per video, whose predictions are averaged"))
    num_crops: int = field(
        default=1, metadata=describe("crops per clip, whose predictions are averaged; the published models used 3")
    )

    def __post_init__(self) -> None:
        check_range("num_clips", self.num_clips, 1, 100)
        check_range("num_crops", self.num_crops, 1, 100)

    def views(self) -> Views:
        return Views(self.frame_sampling, self.num_clips, self.num_crops)


@dataclass
class VideoTrainingArguments(ViewArguments, AugmentationArguments):
    """Augmentation of the training clips, which is the same for all frames of a clip; and the parts of a video that are
    evaluated."""

    def __post_init__(self) -> None:
        ViewArguments.__post_init__(self)
        AugmentationArguments.__post_init__(self)


class VideoClassification(ImageClassification):
    """Like image classification, with clips of frames instead of images; see `task.Task`.

    A training batch has "pixel_values" (batch, frames, channels, height, width); an evaluation batch has (batch, views,
    frames, channels, height, width), and the probabilities of a video's views are averaged.

    Args:
        arguments: options for augmentation, mixing and the views; an evaluation needs only the views.
    """

    name: ClassVar[str] = "video-classification"
    auto_class: ClassVar[Any] = AutoModelForVideoClassification
    training_arguments: ClassVar[type] = VideoTrainingArguments
    evaluation_arguments: ClassVar[type] = ViewArguments
    medium: ClassVar[Medium] = VIDEOS

    def __init__(self, arguments: VideoTrainingArguments | ViewArguments | None = None) -> None:
        self.arguments: Any = arguments or VideoTrainingArguments()

    # Data

    def training_items(self, rows: Any, image_processor: BaseImageProcessor, seed: int) -> TrainingClips:  # type: ignore[override]
        kind = StreamedTrainingClips if isinstance(rows, ImageStream) else TrainingClips
        return kind(rows, image_processor, self.arguments.image_augmentation(), seed)

    def evaluation_items(self, rows: Any, image_processor: BaseImageProcessor) -> EvaluationClips:  # type: ignore[override]
        return EvaluationClips(rows, image_processor, self.arguments.views())

    # Training

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"].flatten(0, -5)}

    # Evaluation

    @property
    def num_views(self) -> int:
        return self.arguments.num_clips * self.arguments.num_crops

    def predict(self, model: PrunableModel, batch: Batch) -> ImageClassifierOutput:
        """Outputs whose `logits` (batch, labels) are the logarithms of each video's probabilities, averaged over its
        views. The model sees one view of each video at a time, so that the memory does not depend on the number of
        views."""
        clips = batch["pixel_values"].unbind(1)
        of_views = torch.stack([at_least_float32(model(pixel_values=each).logits).log_softmax(-1) for each in clips])
        return ImageClassifierOutput(logits=of_views.logsumexp(0) - math.log(len(clips)))

    # Pictures

    def draw(self, model: PrunableModel, image_processor: BaseImageProcessor, batch: Batch) -> Image.Image:
        """Shows the middle view of each video."""
        views = batch["pixel_values"]
        views = views if views.ndim == 5 else views[:, views.shape[1] // 2]
        return super().draw(model, image_processor, {**batch, "pixel_values": views})
