"""What data sets for segmentation and detection have in common: images of any size, and the separate steps of an image
processor."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio

from hf_vssm_prune.training.data.epochs import Epochs
from hf_vssm_prune.training.image_steps import decode_image, given_sides, name_stored


class DenseItems(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of images with additional annotations.

    Args:
        dataset: stored rows or a stream, with the name of its split in `split`.
        image_processor: the model's image processor.
    """

    def __init__(self, dataset: Any, image_processor: BaseImageProcessor) -> None:
        self._dataset, self._image_processor = dataset, image_processor
        values = image_processor.to_dict()
        self._mode = "L" if values.get("do_normalize") and len(np.atleast_1d(values["image_mean"])) == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index}: there are {len(self)}.")
        row = self._dataset[index]
        return self._item(row, f"row {row['row']}", index)

    def _item(self, row: Mapping[str, Any], place: str, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _name(self, kind: str, place: str, stored: Mapping[str, Any] | None) -> str:
        return name_stored(kind, place, self._dataset.split, stored)

    def _image(self, row: Mapping[str, Any], place: str) -> Image.Image:
        return decode_image(row["image"], self._mode, self._name("image", place, row["image"]))


class StreamedDenseItems(DenseItems):
    """The same for training images that are read sequentially. An "index" is the position in the epoch's order together
    with the row itself, as returned by `sampling.StreamSampler`."""

    _epoch: Epochs

    @property
    def stream(self) -> Any:
        return self._dataset

    def __getitem__(self, numbered_row: Any) -> dict[str, Any]:
        place, row = numbered_row
        return self._item(row, f"place {place} of epoch {int(self._epoch)}", place)


def resized_size(image_processor: BaseImageProcessor, image: Image.Image) -> tuple[int, int]:
    """(height, width) to which an image processor resizes an image; the image's own size if it does not resize.

    Raises:
        ValueError: the image processor's size is neither height and width nor a shortest edge.
    """
    values = image_processor.to_dict()
    if not values.get("do_resize"):
        return image.height, image.width
    size = given_sides(values["size"])
    if size.keys() == {"height", "width"}:
        return size["height"], size["width"]
    if "shortest_edge" not in size:
        raise ValueError(f"The image processor's size is {size}: it must have height and width, or a shortest edge.")
    height, width = get_size_with_aspect_ratio(
        (image.height, image.width), size["shortest_edge"], size.get("longest_edge")
    )
    return height, width


def normalize(image_processor: BaseImageProcessor, image: Image.Image) -> Tensor:
    """Pixel values (channels, height, width) of an image, without resizing it."""
    return image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]


def fixed_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """(height, width) to which an image processor resizes all images.

    Raises:
        ValueError: the image processor keeps the aspect ratio, or does not resize.
    """
    values = image_processor.to_dict()
    size = values.get("size") or {}
    if not values.get("do_resize") or not (size.get("height") and size.get("width")):
        raise ValueError(
            f"The image processor's size is {dict(size)}, with do_resize {values.get('do_resize')}: a detector's "
            "images are all resized to one height and width; give --input_size."
        )
    return size["height"], size["width"]
