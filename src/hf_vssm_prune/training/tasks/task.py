"""The interface between a task and the training loop, the evaluation, the estimate and the commands, which contain no
code specific to a task.

A task is a class in its own file, listed in the table of `training.tasks`. It stores its options (`arguments`) and no
other state: all randomness comes from generators and seeds passed to it, so that a run can be resumed exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.hub.model_card import Evaluation, Measurement
from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.data import ImageDatasets
from hf_vssm_prune.training.losses import LossWeights


# A `PreTrainedModel` with a backbone of this package that is also a `TokenPruningMixin`: Python cannot express both.
PrunableModel: TypeAlias = Any
Batch: TypeAlias = dict[str, Any]
# One entry for each image of a batch: a tensor (batch, ...), or a list if entries differ in size.
Scores: TypeAlias = Tensor | list[Any]


@dataclass
class NoArguments:
    """Options of a task that has none."""


class EvaluationItems(Protocol):
    """A `torch.utils.data.Dataset` of dicts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Mapping[str, Any]: ...


class TrainingItems(EvaluationItems, Protocol):
    """The same with augmentation. Randomness in an item depends only on the seed, the epoch and the index."""

    def set_epoch(self, epoch: int) -> None:
        """Called before the data loader's iterator is created."""


class Task(Protocol):
    """What a model is trained for, and how it is evaluated.

    A task may also define `predict(model, batch)`, if an evaluation needs more than a forward pass of the batch's
    inputs; `parts(image_size)`, if that is a forward pass for each part of an image; `num_views`, if it is several
    forward passes for each video; `image_processor(image_processor)`, if its models need another image processor than
    their checkpoint's; and `idle_parameters = True`, if some batches leave parameters without a gradient. See
    `predict`, `parts_of`, `views_of`, `image_processor_of` and `leaves_parameters_idle`.

    Attributes:
        name: name on the command line (`--task`) and in checkpoints; that of transformers' pipeline if there is one.
        auto_class: transformers' Auto class for its models.
        training_arguments, evaluation_arguments: dataclasses of its options, see `training.arguments`.
        metric_for_best_model: the metric that selects the best weights.
        greater_is_better: whether higher values of this metric are better.
        shown_metrics: the metrics shown in tables, by name: a title, and a number format.
        arguments: its options, an instance of one of the two classes. Training options become settings of the run,
            which are stored in checkpoints and must be the same in a resumed run.
    """

    name: ClassVar[str]
    auto_class: ClassVar[Any]
    training_arguments: ClassVar[type]
    evaluation_arguments: ClassVar[type]
    metric_for_best_model: ClassVar[str]
    greater_is_better: ClassVar[bool]
    shown_metrics: ClassVar[Mapping[str, tuple[str, str]]]
    arguments: Any

    def __init__(self, arguments: Any) -> None: ...

    # Data

    def load_datasets(self, data: DataArguments, seed: int) -> ImageDatasets:
        """Both data sets of a training run. `label_names` are the names of the model's outputs: `config.id2label`."""

    def load_evaluation_dataset(self, data: EvaluationDataArguments, seed: int) -> tuple[Any, Sequence[str]]:
        """The rows to evaluate, and the names of the model's outputs."""

    def training_items(self, rows: Any, image_processor: BaseImageProcessor, seed: int) -> TrainingItems:
        """The training items of `ImageDatasets.train`, which contains stored rows or a stream."""

    def evaluation_items(self, rows: Any, image_processor: BaseImageProcessor) -> EvaluationItems:
        """The items of `ImageDatasets.evaluation`, prepared by the image processor."""

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of items: "pixel_values" (batch, ...) and everything else the other methods need. Tensors, and lists
        and dicts of tensors, are moved to the device."""

    def example_batch(self, config: VisionMambaConfig, batch_size: int, device: torch.device) -> Batch:
        """A random training batch for a model with this configuration, or for one that is created from it, used to
        measure memory and speed."""

    # Models

    def load_model(
        self,
        name_or_path: str,
        label_names: Sequence[str],
        drop_path_rate: float = 0.0,
        ignore_mismatched_sizes: bool = False,
        some_labels: bool = False,
        dtype: str = "float32",
    ) -> PrunableModel:
        """Loads a checkpoint as a model for the data set's labels; see `models.load_model`."""

    def load_teacher(
        self,
        name_or_path: str,
        student: VisionMambaConfig,
        losses: LossWeights,
        dtype: str = "float32",
        image_size: int | None = None,
    ) -> PrunableModel:
        """Loads the dense model from which a student learns; see `models.load_teacher`."""

    # Training

    def mix(self, batch: Batch, config: VisionMambaConfig, generator: np.random.Generator) -> Batch:
        """The batch with its images mixed (mixup, CutMix, mosaic, ...), or unchanged. The given batch is not
        modified."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments for the model's forward pass. They include labels only if the model has to compute its own
        loss."""

    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss by name, each a scalar averaged over the batch. The task minimises their sum."""

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """The distance between the outputs of a student and its dense teacher: a scalar averaged over the batch."""

    # Evaluation

    def scores(self, outputs: Any, batch: Batch) -> Scores:
        """The values from which the metrics are computed, for each image. They are gathered from all processes, without
        duplicates."""

    def metrics(self, scores: Sequence[Scores]) -> dict[str, float]:
        """The metrics by name, from the scores of all batches."""

    # Pictures

    def draw(self, model: PrunableModel, image_processor: BaseImageProcessor, batch: Batch) -> Image.Image | None:
        """A picture of how a pruned model processes a batch, for cards and trackers; None if there is none."""

    def evaluation_on_card(
        self, metrics: Mapping[str, float], num_images: int, dataset_name: str, split: str, pruned: bool
    ) -> Evaluation | None:
        """The metrics in the form used by model cards; None if the card does not show them."""


def evaluation_of_task(
    task: Any, metrics: Mapping[str, float], num_images: int, dataset_name: str, split: str, pruned: bool
) -> Evaluation:
    """`Task.evaluation_on_card` for the metrics that the task shows in tables."""
    shown = {name: metrics[name] for name in task.shown_metrics}
    measured = Measurement.of_metrics("this model", shown, pruned=pruned)
    return Evaluation(dataset_name, dataset_name, split, num_images, measured)


def predict(task: Task, model: Any, batch: Batch) -> Any:
    """The input of `Task.scores` for a batch: the task's own prediction if it defines `predict`, otherwise the model's
    outputs."""
    own = getattr(task, "predict", None)
    return model(**task.inputs(batch)) if own is None else own(model, batch)


def parts_of(task: Task, input_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sizes of the inputs for which a model runs in the evaluation of one image of this size: the image itself, or
    its parts. The views of a video are not parts: each is as large as the video."""
    own = getattr(task, "parts", None)
    return [input_size] if own is None else own(input_size)


def views_of(task: Task) -> int:
    """The number of forward passes in which an evaluation looks at one image or video."""
    return int(getattr(task, "num_views", 1))


def image_processor_of(task: Task, image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """The image processor of a model in training for the task, created from the checkpoint's."""
    own = getattr(task, "image_processor", None)
    return image_processor if own is None else own(image_processor)


def leaves_parameters_idle(task: Task) -> bool:
    """Whether some batches leave parameters without a gradient, for which processes must not wait."""
    return bool(getattr(task, "idle_parameters", False))
