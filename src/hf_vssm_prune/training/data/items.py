"""Data sets of images, decoded and augmented on access. For videos, see `clips`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import BaseImageProcessor

from hf_vssm_prune.training.augmentation import (
    AugmentationConfig,
    randaugment,
    random_crop_with_padding,
    random_erasing,
    random_resized_crop,
)
from hf_vssm_prune.training.data.columns import ImageStream
from hf_vssm_prune.training.data.epochs import Epochs
from hf_vssm_prune.training.image_steps import ImageError, ImageProcessorSteps, decode_image, name_stored


class Items(torch.utils.data.Dataset[dict[str, Any]]):
    """Images (or other media) from `load_image_dataset`, decoded on access."""

    kind = "image"

    def __init__(self, dataset: Any, image_processor: BaseImageProcessor) -> None:
        self._dataset = dataset
        self._steps = ImageProcessorSteps(image_processor)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no {self.kind} {index}: there are {len(self)}.")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Called by a data loader for a whole batch: a single look-up in the table is faster than many."""
        rows = self._dataset[indices]
        return [
            self._item(index, stored, label, f"row {row}")
            for index, stored, label, row in zip(indices, rows["image"], rows["label"], rows["row"], strict=True)
        ]

    def _item(self, index: int, stored: Mapping[str, Any] | None, label: int, place: str) -> dict[str, Any]:
        name = name_stored(self.kind, place, self._dataset.split, stored)
        return {"pixel_values": self._pixel_values(stored, index, name), "labels": label}

    def _pixel_values(self, stored: Mapping[str, Any] | None, index: int, name: str) -> torch.Tensor:
        raise NotImplementedError


class EvaluationImages(Items):
    """Images prepared by the image processor.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": int}.

    Args:
        dataset: A data set from `load_image_dataset` or `load_evaluation_dataset`.
        image_processor: An image processor supported by `ImageProcessorSteps`.
    """

    def _pixel_values(self, stored: Mapping[str, Any] | None, index: int, name: str) -> torch.Tensor:
        return self._steps(decode_image(stored, self._steps.mode, name))


class AugmentedItems(Items):
    """Items for training, whose randomness is that of `epochs.Epochs`.

    Args:
        dataset: A data set from `load_image_dataset`.
        image_processor: An image processor supported by `ImageProcessorSteps`.
        augmentation: The augmentation to apply.
        seed: Not negative.
    """

    def __init__(
        self,
        dataset: Dataset | ImageStream,
        image_processor: BaseImageProcessor,
        augmentation: AugmentationConfig,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, image_processor)
        self._augmentation, self._epoch = augmentation, Epochs(seed)

    def set_epoch(self, epoch: int) -> None:
        """Call this before creating the data loader's iterator, because workers read ahead."""
        self._epoch.set(epoch)

    def _augment(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        augmentation, steps = self._augmentation, self._steps
        if augmentation.random_resized_crop_scale is not None:
            image = random_resized_crop(
                image, steps.size, augmentation.random_resized_crop_scale, steps.resample, generator
            )
        else:
            image = random_crop_with_padding(steps.resize_and_crop(image), augmentation.random_crop_padding, generator)
        if generator.random() < augmentation.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return randaugment(image, augmentation, steps.resample, steps.fill, generator)


class TrainingImages(AugmentedItems):
    """Augmented images.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": int}.
    """

    def _pixel_values(self, stored: Mapping[str, Any] | None, index: int, name: str) -> torch.Tensor:
        generator = self._epoch.generator(index)
        image = self._augment(decode_image(stored, self._steps.mode, name), generator)
        return random_erasing(self._steps.normalize(image), self._augmentation.random_erasing, generator)


class StreamedItems(AugmentedItems):
    """Items of an `ImageStream`.

    An "index" is the position in the epoch's order together with the row itself, as returned by
    `sampling.StreamSampler`: the training process reads the rows, and its workers decode and augment them.
    """

    @property
    def stream(self) -> ImageStream:
        return self._dataset

    def __getitem__(self, numbered_row: tuple[int, dict[str, Any]]) -> dict[str, Any]:  # type: ignore[override]
        return self.__getitems__([numbered_row])[0]

    def __getitems__(self, numbered_rows: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:  # type: ignore[override]
        epoch = int(self._epoch)
        return [
            self._item(place, row["image"], self._label(row, place), f"place {place} of epoch {epoch}")
            for place, row in numbered_rows
        ]

    def _label(self, row: Mapping[str, Any], place: int) -> int:
        label, count = row["label"], self._dataset.rows.features["label"].num_classes
        if label is None or not 0 <= label < count:
            raise ImageError(
                f"The {self.kind} in place {place} of split '{self._dataset.split}' has the label {label}: allowed "
                f"labels are 0 to {count - 1}."
            )
        return label


class StreamedTrainingImages(StreamedItems, TrainingImages):
    """Augmented images of a stream."""


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks samples into {"pixel_values": (batch, *theirs), "labels": (batch,) int64}."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }
