"""Decodes and checks masks, which have a class id in each pixel."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_vssm_prune.training.image_steps import ImageError, read_stored, upright


IGNORED_AFTER_REDUCTION = 255
SHOWN_IDS = 5


def decode_mask(stored: Mapping[str, Any] | None, name: str) -> np.ndarray:
    """Class ids, int64 (height, width), of a mask stored by `datasets.Image(decode=False)`.

    These are the pixels of a greyscale image, the indices of a palette image, or the common value of the three channels
    of a colour image. The mask's own EXIF orientation is applied, as its image's is.

    Raises:
        ImageError: it is missing or damaged, or has colours instead of ids.
    """
    pixels = np.asarray(read_stored(stored, name, upright))
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
        if not (pixels == pixels[..., :1]).all():
            raise ImageError(
                f"{name} is a colour image: a mask must have a class id in each pixel, as a greyscale or palette image."
            )
        pixels = pixels[..., 0]
    if pixels.dtype.kind == "f":
        raise ImageError(f"{name} has pixels of type {pixels.dtype}: they must be whole numbers.")
    return pixels.astype(np.int64)


def reduced(ids: np.ndarray, reduce_labels: bool) -> np.ndarray:
    """Converts classes counted from 1, with 0 for no class, to classes counted from 0: 0 becomes 255, and 255 stays
    255."""
    if not reduce_labels:
        return ids
    ignored = (ids == 0) | (ids == IGNORED_AFTER_REDUCTION)
    return np.where(ignored, IGNORED_AFTER_REDUCTION, ids - 1)


def check_mask(ids: np.ndarray, image_size: tuple[int, int], num_labels: int, ignore_index: int, name: str) -> None:
    """Raises an error for a mask that does not fit its image or the classes.

    Args:
        ids: (height, width).
        image_size: (width, height) of the image.
        num_labels: number of classes.
        ignore_index: the id for no class.
        name: name of the mask in error messages.

    Raises:
        ImageError: it has another size, or ids that are no class.
    """
    height, width = ids.shape
    if (width, height) != image_size:
        raise ImageError(
            f"{name} is {width} x {height} pixels, and its image {image_size[0]} x {image_size[1]}: they must have "
            "the same size."
        )
    wrong = np.unique(ids[((ids < 0) | (ids >= num_labels)) & (ids != ignore_index)])
    if wrong.size:
        more = ", …" if wrong.size > SHOWN_IDS else ""
        raise ImageError(
            f"{name} has the class ids {', '.join(map(str, wrong[:SHOWN_IDS]))}{more}: allowed values are 0 to "
            f"{num_labels - 1}, and {ignore_index} for pixels of no class."
        )
