"""Data sets for detection: images of one size and boxes, decoded and augmented on access.

As in RT-DETR, all images are resized to the same size, regardless of their aspect ratio: these backbones have no
padding mask, so they would scan the padding of a smaller image and keep some of its tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from hf_vssm_prune.training.box_augmentation import BoxAugmentation, augment_boxes
from hf_vssm_prune.training.data.columns import ImageStream
from hf_vssm_prune.training.data.dense_items import DenseItems, StreamedDenseItems, normalize, resized_size
from hf_vssm_prune.training.data.epochs import Epochs
from hf_vssm_prune.training.data.objects import fit_boxes
from hf_vssm_prune.training.image_steps import resampling


class _BoxedItems(DenseItems):
    """Images with boxes, see `load_detection_datasets`."""

    def _item(self, row: Mapping[str, Any], place: str, index: int) -> dict[str, Any]:
        image = self._image(row, place)
        boxes = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
        corners = fit_boxes(boxes, image.size, self._name("objects", place, row["image"]))
        labels, crowd = np.asarray(row["labels"], np.int64), np.asarray(row["crowd"], bool)
        return self._prepare(image, corners, labels, crowd, index)

    def _prepare(
        self, image: Image.Image, corners: np.ndarray, labels: np.ndarray, crowd: np.ndarray, index: int
    ) -> dict[str, Any]:
        raise NotImplementedError


class EvaluationBoxes(_BoxedItems):
    """Images prepared by the image processor.

    Each item is {"pixel_values": float32 (channels, height, width), "objects": {"boxes": float32 (n, 4), left, top,
    right and bottom in pixels of the image as it was; "labels": int64 (n,); "crowd": bool (n,); "size": int64 (2,),
    height and width of the image as it was}}.
    """

    def _prepare(
        self, image: Image.Image, corners: np.ndarray, labels: np.ndarray, crowd: np.ndarray, index: int
    ) -> dict[str, Any]:
        height, width = resized_size(self._image_processor, image)
        resized = image.resize((width, height), resampling(self._image_processor))
        objects = {
            "boxes": torch.from_numpy(corners * np.array(image.size * 2)).float(),
            "labels": torch.from_numpy(labels),
            "crowd": torch.from_numpy(crowd),
            "size": torch.tensor([image.height, image.width]),
        }
        return {"pixel_values": normalize(self._image_processor, resized), "objects": objects}


class TrainingBoxes(_BoxedItems):
    """Augmented images and boxes. Randomness depends only on the seed, the epoch and the index.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": {"class_labels": int64 (n,), "boxes":
    float32 (n, 4), middle, width and height as fractions of the image's sides}}, which transformers' detectors take.
    Crowds are left out.

    Args:
        images: images from `load_detection_datasets`.
        image_processor: the model's image processor, which determines the size.
        augmentation: the augmentation, whose size is that of the image processor.
        seed: not negative.
    """

    def __init__(
        self,
        images: Dataset | ImageStream,
        image_processor: BaseImageProcessor,
        augmentation: BoxAugmentation,
        seed: int,
    ) -> None:
        super().__init__(images, image_processor)
        self._augmentation, self._epoch = augmentation, Epochs(seed)
        mean = np.atleast_1d(image_processor.to_dict().get("image_mean") or 0.5)
        self._fill = tuple(round(255 * float(value)) for value in mean)

    def set_epoch(self, epoch: int) -> None:
        """Call this before creating the data loader's iterator, because workers read ahead."""
        self._epoch.set(epoch)

    def _prepare(
        self, image: Image.Image, corners: np.ndarray, labels: np.ndarray, crowd: np.ndarray, index: int
    ) -> dict[str, Any]:
        image, corners, kept = augment_boxes(
            image,
            corners[~crowd],
            resampling(self._image_processor),
            self._fill,
            self._augmentation,
            self._epoch.generator(index),
        )
        boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
        given = {"class_labels": torch.from_numpy(labels[~crowd][kept]), "boxes": torch.from_numpy(boxes).float()}
        return {"pixel_values": normalize(self._image_processor, image), "labels": given}


class StreamedTrainingBoxes(StreamedDenseItems, TrainingBoxes):
    """The same for a stream."""


def collate_boxes(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | list[Any]]:
    """A batch: {"pixel_values": (batch, channels, height, width)}, and lists of the other fields of the items."""
    batch: dict[str, Tensor | list[Any]] = {name: [item[name] for item in items] for name in items[0]}
    batch["pixel_values"] = torch.stack([item["pixel_values"] for item in items])
    return batch
