"""What a data loader reads for segmentation: images and masks, decoded and augmented when they are asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio

from hf_vssm_prune.training.data.masks import check_mask, decode_mask, reduced
from hf_vssm_prune.training.data.segmentation import Pairs, PairStream
from hf_vssm_prune.training.image_steps import decode_image
from hf_vssm_prune.training.mask_augmentation import MaskAugmentation, augment


class _MaskedImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Pairs of images and masks.

    Args:
        pairs: as `load_segmentation_datasets` gives them.
        image_processor: that of the model.
        ignore_index, reduce_labels: see `load_segmentation_datasets`.
    """

    def __init__(
        self, pairs: Pairs | PairStream, image_processor: BaseImageProcessor, ignore_index: int, reduce_labels: bool
    ) -> None:
        self._pairs, self._image_processor = pairs, image_processor
        self._ignore_index, self._reduce_labels = ignore_index, reduce_labels
        values = image_processor.to_dict()
        self._mode = "L" if values.get("do_normalize") and len(np.atleast_1d(values["image_mean"])) == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index}: there are {len(self)}.")
        row = self._pairs.rows[index]
        return self._item(row, f"row {row['row']}", index)

    def _item(self, row: Mapping[str, Any], place: str, index: int) -> dict[str, Any]:
        image_name, mask_name = (f"The {kind} in {place} of split '{self._pairs.split}'" for kind in ("image", "mask"))
        image = decode_image(row["image"], self._mode, _with_path(image_name, row["image"]))
        mask_name = _with_path(mask_name, row["mask"])
        mask = reduced(decode_mask(row["mask"], mask_name), self._reduce_labels)
        check_mask(mask, image.size, self._pairs.num_labels, self._ignore_index, mask_name)
        return self._prepare(image, mask, index)

    def _prepare(self, image: Image.Image, mask: np.ndarray, index: int) -> dict[str, Any]:
        raise NotImplementedError


def _with_path(name: str, stored: Mapping[str, Any] | None) -> str:
    return name if stored is None or stored["path"] is None else f"{name} ('{stored['path']}')"


class EvaluationMasks(_MaskedImages):
    """Images as the image processor gives them, with their masks as they are.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": int64 (height, width) of the mask}.

    Args:
        size_divisor: images are stretched so that their sides are multiples of it.
    """

    def __init__(
        self,
        pairs: Pairs,
        image_processor: BaseImageProcessor,
        ignore_index: int,
        reduce_labels: bool,
        size_divisor: int = 1,
    ) -> None:
        super().__init__(pairs, image_processor, ignore_index, reduce_labels)
        self._size_divisor = size_divisor

    def _prepare(self, image: Image.Image, mask: np.ndarray, index: int) -> dict[str, Any]:
        size = resized_size(self._image_processor, image)
        height, width = (-(-side // self._size_divisor) * self._size_divisor for side in size)
        image = image.resize((width, height), resampling(self._image_processor))
        return {"pixel_values": normalize(self._image_processor, image), "labels": torch.from_numpy(mask)}


class TrainingMasks(_MaskedImages):
    """Augmented images and masks, all of one size. What is random in one depends on the seed, the epoch and the index
    alone.

    Each item is {"pixel_values": float32 (channels, height, width), "labels": int64 (height, width)}.

    Args:
        augmentation: what to do to them.
        seed: not negative.
    """

    def __init__(
        self,
        pairs: Pairs | PairStream,
        image_processor: BaseImageProcessor,
        ignore_index: int,
        reduce_labels: bool,
        augmentation: MaskAugmentation,
        seed: int,
    ) -> None:
        super().__init__(pairs, image_processor, ignore_index, reduce_labels)
        self._augmentation, self._seed = augmentation, seed
        # In shared memory, so that the persistent workers of a data loader see the new epoch as well.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Call it before the data loader's iterator is made: workers read ahead."""
        self._epoch.fill_(epoch)

    def _prepare(self, image: Image.Image, mask: np.ndarray, index: int) -> dict[str, Any]:
        generator = np.random.default_rng((self._seed, int(self._epoch), index))
        size, resample = resized_size(self._image_processor, image), resampling(self._image_processor)
        image, mask = augment(image, mask, size, resample, self._augmentation, self._ignore_index, generator)
        crop_height, crop_width = self._augmentation.crop_size
        padding = (0, crop_width - image.width, 0, crop_height - image.height)
        labels = torch.nn.functional.pad(torch.from_numpy(mask), padding, value=self._ignore_index)
        # 0 is the mean colour.
        pixel_values = torch.nn.functional.pad(normalize(self._image_processor, image), padding)
        return {"pixel_values": pixel_values, "labels": labels}


class StreamedTrainingMasks(TrainingMasks):
    """The same of a `PairStream`, whose "index" is the place in the epoch's order together with the row itself."""

    def __getitem__(self, numbered_row: Any) -> dict[str, Any]:
        place, row = numbered_row
        return self._item(row, f"place {place} of epoch {int(self._epoch)}", place)


def resized_size(image_processor: BaseImageProcessor, image: Image.Image) -> tuple[int, int]:
    """(height, width) to which an image processor resizes an image; its own where it does not resize.

    Raises:
        ValueError: the image processor does not say it by height and width or by a shortest edge.
    """
    values = image_processor.to_dict()
    if not values.get("do_resize"):
        return image.height, image.width
    size = {name: value for name, value in values["size"].items() if value is not None}
    if size.keys() == {"height", "width"}:
        return size["height"], size["width"]
    if "shortest_edge" not in size:
        raise ValueError(f"The image processor's size is {size}: height and width, or a shortest edge, are needed.")
    height, width = get_size_with_aspect_ratio(
        (image.height, image.width), size["shortest_edge"], size.get("longest_edge")
    )
    return height, width


def resampling(image_processor: BaseImageProcessor) -> Image.Resampling:
    """The filter of an image processor's resizing."""
    resample = image_processor.to_dict().get("resample")
    return Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)


def normalize(image_processor: BaseImageProcessor, image: Image.Image) -> Tensor:
    """Pixel values (channels, height, width) of an image as large as it is."""
    return image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]


def collate_masks(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: {"pixel_values": (batch, channels, height, width), "labels": (batch, height, width)}, and lists in place
    of tensors where the images differ in size."""
    batch: dict[str, Any] = {}
    for name in ("pixel_values", "labels"):
        tensors = [item[name] for item in items]
        same = len({tensor.shape for tensor in tensors}) == 1
        batch[name] = torch.stack(tensors) if same else tensors
    return batch
