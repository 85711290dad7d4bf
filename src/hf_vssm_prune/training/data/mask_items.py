"""Data sets for segmentation: images and masks, decoded and augmented on access."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from hf_vssm_prune.training.data.dense_items import DenseItems, StreamedDenseItems, normalize, resized_size
from hf_vssm_prune.training.data.epochs import Epochs
from hf_vssm_prune.training.data.masks import check_mask, decode_mask, reduced
from hf_vssm_prune.training.data.segmentation import MaskOptions, Pairs, PairStream
from hf_vssm_prune.training.image_steps import resampling
from hf_vssm_prune.training.mask_augmentation import MaskAugmentation, augment


class _MaskedImages(DenseItems):
    """Pairs of images and masks.

    Args:
        pairs: pairs from `load_segmentation_datasets`.
        image_processor: the model's image processor.
        options: format of the masks.
    """

    def __init__(self, pairs: Pairs | PairStream, image_processor: BaseImageProcessor, options: MaskOptions) -> None:
        super().__init__(pairs, image_processor)
        self._ignore_index, self._reduce_labels = options.ignore_index, options.reduce_labels

    def _item(self, row: Mapping[str, Any], place: str, index: int) -> dict[str, Any]:
        image = self._image(row, place)
        mask_name = self._name("mask", place, row["mask"])
        mask = reduced(decode_mask(row["mask"], mask_name), self._reduce_labels)
        check_mask(mask, image.size, self._dataset.num_labels, self._ignore_index, mask_name)
        return self._prepare(image, mask, index)

    def _prepare(self, image: Image.Image, mask: np.ndarray, index: int) -> dict[str, Any]:
        raise NotImplementedError


class EvaluationMasks(_MaskedImages):
    """Images prepared by the image processor, with unchanged masks.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": int64 (height, width) of the mask}.

    Args:
        size_divisor: images are stretched so that their sides are multiples of it.
    """

    def __init__(
        self, pairs: Pairs, image_processor: BaseImageProcessor, options: MaskOptions, size_divisor: int = 1
    ) -> None:
        super().__init__(pairs, image_processor, options)
        self._size_divisor = size_divisor

    def _prepare(self, image: Image.Image, mask: np.ndarray, index: int) -> dict[str, Any]:
        size = resized_size(self._image_processor, image)
        height, width = (-(-side // self._size_divisor) * self._size_divisor for side in size)
        image = image.resize((width, height), resampling(self._image_processor))
        return {"pixel_values": normalize(self._image_processor, image), "labels": torch.from_numpy(mask)}


class TrainingMasks(_MaskedImages):
    """Augmented images and masks, all of the same size. Randomness depends only on the seed, the epoch and the index.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": int64 (height, width)}.

    Args:
        augmentation: the augmentation to apply.
        seed: not negative.
    """

    def __init__(
        self,
        pairs: Pairs | PairStream,
        image_processor: BaseImageProcessor,
        options: MaskOptions,
        augmentation: MaskAugmentation,
        seed: int,
    ) -> None:
        super().__init__(pairs, image_processor, options)
        self._augmentation, self._epoch = augmentation, Epochs(seed)

    def set_epoch(self, epoch: int) -> None:
        """Call this before creating the data loader's iterator, because workers read ahead."""
        self._epoch.set(epoch)

    def _prepare(self, image: Image.Image, mask: np.ndarray, index: int) -> dict[str, Any]:
        generator = self._epoch.generator(index)
        size, resample = resized_size(self._image_processor, image), resampling(self._image_processor)
        image, mask = augment(image, mask, size, resample, self._augmentation, self._ignore_index, generator)
        crop_height, crop_width = self._augmentation.crop_size
        padding = (0, crop_width - image.width, 0, crop_height - image.height)
        labels = torch.nn.functional.pad(torch.from_numpy(mask), padding, value=self._ignore_index)
        # 0 is the mean colour.
        pixel_values = torch.nn.functional.pad(normalize(self._image_processor, image), padding)
        return {"pixel_values": pixel_values, "labels": labels}


class StreamedTrainingMasks(StreamedDenseItems, TrainingMasks):
    """The same for a `PairStream`."""


def collate_masks(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: {"pixel_values": (batch, channels, height, width), "labels": (batch, height, width)}, with lists instead
    of tensors if the images differ in size."""
    batch: dict[str, Any] = {}
    for name in ("pixel_values", "labels"):
        tensors = [item[name] for item in items]
        same = len({tensor.shape for tensor in tensors}) == 1
        batch[name] = torch.stack(tensors) if same else tensors
    return batch
