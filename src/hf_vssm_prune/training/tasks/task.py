"""What a task is to the training loop, the evaluation, the estimate and the scripts, which know no task by themselves.

A task is one class in one file, entered in the table of `training.tasks`. It holds its options (`arguments`) and no
other state: what is random in it comes from generators and seeds that it is given, so that a run resumes exactly.
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
from hf_vssm_prune.hub.model_card import Evaluation
from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.data import ImageDatasets
from hf_vssm_prune.training.losses import LossWeights


# A `PreTrainedModel` with a backbone of this package, which is a `TokenPruningMixin`: Python has no type for both.
PrunableModel: TypeAlias = Any
Batch: TypeAlias = dict[str, Any]
# Of the images of one batch, one entry for each: a tensor (batch, ...), or a list where they differ in size.
Scores: TypeAlias = Tensor | list[Any]


@dataclass
class NoArguments:
    """For a task without options of its own."""


class EvaluationItems(Protocol):
    """A `torch.utils.data.Dataset` of dicts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Mapping[str, Any]: ...


class TrainingItems(EvaluationItems, Protocol):
    """The same, augmented. What is random in an item depends on the seed, the epoch and its index alone."""

    def set_epoch(self, epoch: int) -> None:
        """Called before the data loader's iterator is made."""


class Task(Protocol):
    """What is trained for, and how it is measured.

    A task may also have `predict(model, batch)`, where a measurement takes more than a forward of the batch's inputs,
    `image_processor(image_processor)`, where its models need another than their checkpoint's, and
    `idle_parameters = True`, where some batches leave parameters without a gradient: see `predict`,
    `image_processor_of` and `leaves_parameters_idle`.

    Attributes:
        name: on the command line (`--task`) and in checkpoints; that of transformers' pipeline where there is one.
        auto_class: transformers' Auto class of its models.
        training_arguments, evaluation_arguments: dataclasses of its options, see `training.arguments`.
        metric_for_best_model: the metric by which the best weights are chosen.
        greater_is_better: whether more of it is better.
        shown_metrics: those that tables show, by name: a title, and how the number is formatted.
        arguments: its options, of one of the two classes. Those of training become settings of the run, which a
            checkpoint holds and a continuation must share.
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
        """Both sides of a training run. `label_names` are the names of what the model puts out: `config.id2label`."""

    def load_evaluation_dataset(self, data: EvaluationDataArguments, seed: int) -> tuple[Any, Sequence[str]]:
        """The rows to evaluate, and the same names."""

    def training_items(self, rows: Any, image_processor: BaseImageProcessor, seed: int) -> TrainingItems:
        """The training items of `ImageDatasets.train`, rows or a stream of them."""

    def evaluation_items(self, rows: Any, image_processor: BaseImageProcessor) -> EvaluationItems:
        """The items of `ImageDatasets.evaluation`, as the image processor prepares them."""

    def collate(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of items: "pixel_values" (batch, ...) and whatever the other methods need. Tensors, and lists and
        dicts of tensors, are moved to the device."""

    def example_batch(self, config: VisionMambaConfig, batch_size: int, device: torch.device) -> Batch:
        """A random batch for a model of this configuration: memory and speed are measured with it."""

    # Models

    def load_model(
        self,
        name_or_path: str,
        label_names: Sequence[str],
        drop_path_rate: float = 0.0,
        ignore_mismatched_sizes: bool = False,
        some_labels: bool = False,
    ) -> PrunableModel:
        """A checkpoint as a model of the data set's labels, in float32; see `models.load_model`."""

    def load_teacher(
        self,
        name_or_path: str,
        student: VisionMambaConfig,
        losses: LossWeights,
        dtype: str = "float32",
        image_size: int | None = None,
    ) -> PrunableModel:
        """The dense model from which a student learns; see `models.load_teacher`."""

    # Training

    def mix(self, batch: Batch, config: VisionMambaConfig, generator: np.random.Generator) -> Batch:
        """The batch with its images mixed (mixup, CutMix, mosaic, ...), or as it is. The given batch is left alone."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the model's forward. With labels only where the model has to compute its own loss."""

    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss by name, each a scalar, mean over the batch; their sum is what the task minimises."""

    def distillation(self, student: Any, teacher: Any, temperature: float) -> Tensor:
        """The distance between the outputs of a student and its dense teacher, a scalar, mean over the batch."""

    # Evaluation

    def scores(self, outputs: Any, batch: Batch) -> Scores:
        """What the metrics need to know of each image. On several processes the scores of all come together, each image
        once."""

    def metrics(self, scores: Sequence[Scores]) -> dict[str, float]:
        """The metrics by name, from the scores of all batches."""

    # To look at

    def draw(self, model: PrunableModel, image_processor: BaseImageProcessor, batch: Batch) -> Image.Image | None:
        """A picture of what a pruned model makes of a batch, for cards and trackers; None if there is none."""

    def evaluation_on_card(
        self, metrics: Mapping[str, float], num_images: int, dataset_name: str, split: str, pruned: bool
    ) -> Evaluation | None:
        """What a model card says of the metrics; None if it says nothing."""


def predict(task: Task, model: Any, batch: Batch) -> Any:
    """What `Task.scores` takes of a batch: the task's own prediction, or the model's outputs."""
    own = getattr(task, "predict", None)
    return model(**task.inputs(batch)) if own is None else own(model, batch)


def image_processor_of(task: Task, image_processor: BaseImageProcessor) -> BaseImageProcessor:
    """That of a model in training for the task, from its checkpoint's."""
    own = getattr(task, "image_processor", None)
    return image_processor if own is None else own(image_processor)


def leaves_parameters_idle(task: Task) -> bool:
    """Whether some batches leave parameters without a gradient, for which processes must not wait."""
    return bool(getattr(task, "idle_parameters", False))
