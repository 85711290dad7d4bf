"""What segmentation and detection have in common; see `task.Task`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np

from hf_vssm_prune.configuration_common import has_head
from hf_vssm_prune.hub.loading import load_config
from hf_vssm_prune.hub.model_card import Evaluation
from hf_vssm_prune.training import dense_models
from hf_vssm_prune.training.losses import LossWeights
from hf_vssm_prune.training.tasks.task import Batch, PrunableModel, evaluation_of_task


logger = logging.getLogger(__name__)


def check_levels(levels: list[int] | None) -> None:
    """Raises an error if `--levels` is not the layers of a backbone in their order."""
    if levels is not None and (sorted(set(levels)) != levels or levels[0] < 1):
        raise ValueError(f"--levels is {levels}: it must be ascending layer numbers, counted from 1.")


def check_scale(scale: list[float]) -> None:
    """Raises an error if `--scale` is not a range of factors."""
    if len(scale) > 2:
        raise ValueError(f"--scale is {scale}: give the smallest and the largest factor, or one number.")


def height_width(name: str, value: Sequence[int]) -> tuple[int, int]:
    """The height and width in an option's values. Raises an error if these are not one or two positive numbers."""
    if len(value) not in (1, 2) or min(value) < 1:
        raise ValueError(f"--{name} is {value}: it must be a number of pixels, or height and width.")
    return value[0], value[-1]


class DenseTask:
    """Models with a head on a backbone (see `dense_models`). Images are not mixed."""

    arguments: Any
    head_arguments: ClassVar[type]  # the options of a new head, which are among those for training
    auto_class: ClassVar[Any]
    shown_metrics: ClassVar[Mapping[str, tuple[str, str]]]

    def load_model(self, name_or_path: str, *args: Any, **options: Any) -> PrunableModel:
        if has_head(load_config(name_or_path)):
            self._warn_of_idle_options(name_or_path)
        return dense_models.load_model(self.auto_class, name_or_path, *args, **options)

    def _warn_of_idle_options(self, name_or_path: str) -> None:
        """Logs which of the given options are for a new head, if the checkpoint has one."""
        options = fields(self.head_arguments) if isinstance(self.arguments, self.head_arguments) else ()
        if idle := [f"--{each.name}" for each in options if getattr(self.arguments, each.name) != each.default]:
            logger.warning("%s has a head already: %s is not used.", name_or_path, ", ".join(idle))

    def load_teacher(
        self,
        name_or_path: str,
        student: Any,
        losses: LossWeights,
        dtype: str = "float32",
        image_size: int | None = None,
    ) -> PrunableModel:
        return dense_models.load_teacher(self.auto_class, name_or_path, student, losses, dtype)

    def mix(self, batch: Batch, config: Any, generator: np.random.Generator) -> Batch:
        return batch

    def evaluation_on_card(
        self, metrics: Mapping[str, float], num_images: int, dataset_name: str, split: str, pruned: bool
    ) -> Evaluation:
        return evaluation_of_task(self, metrics, num_images, dataset_name, split, pruned)
