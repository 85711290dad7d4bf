"""Random augmentation of an image together with its boxes: scale, crop, flips, colours.

No library is used, for the reasons given in `mask_augmentation`.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from hf_vssm_prune.training.dense_augmentation import CROP_TRIES, check_augmentation, distort_colours, resize_part


@dataclass(frozen=True)
class BoxAugmentation:
    """The augmentation of a training image and its boxes.

    Attributes:
        size: (height, width) of the results.
        scale: smallest and largest factor of this size to which an image is resized; larger images are cropped, and
            smaller ones placed at random on the mean colour.
        horizontal_flip, vertical_flip: probabilities of flips.
        photometric_distortion: whether brightness, contrast, saturation and hue are changed.

    Raises:
        ValueError: a value is outside its range.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    photometric_distortion: bool = True

    def __post_init__(self) -> None:
        check_augmentation(self, "size", ("horizontal_flip", "vertical_flip"))


def augment_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    resample: Image.Resampling,
    fill: tuple[int, ...],
    augmentation: BoxAugmentation,
    generator: np.random.Generator,
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """An augmented image of the final size, the boxes in it, and the indices of these boxes.

    A box is kept if its centre is inside the result, and clipped at the edges, as in SSD and RT-DETR.

    Args:
        image: image in mode "L" or "RGB".
        boxes: (n, 4), left, top, right and bottom as fractions of the image's sides.
        resample: filter for resizing.
        fill: the colour around a smaller image, for each channel.
        augmentation: what to apply.
        generator: source of all randomness.

    Returns:
        The image; boxes (m, 4) as fractions of its sides; and their indices (m,) in the given boxes.
    """
    height, width = augmentation.size
    factor = generator.uniform(*augmentation.scale)
    resized = (max(1, round(height * factor)), max(1, round(width * factor)))
    in_pixels = boxes * np.array([resized[1], resized[0]] * 2)
    top, left = _choose_corner(in_pixels, resized, augmentation.size, generator)
    image = _part(image, resized, (top, left), augmentation.size, resample, fill)
    moved = in_pixels - np.array([left, top] * 2)
    kept = np.flatnonzero(_middle_inside(moved, augmentation.size))
    sides = np.array([width, height] * 2)
    moved = np.clip(moved[kept], 0, sides) / sides
    if generator.random() < augmentation.horizontal_flip:
        image, moved = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), _mirrored(moved, 0)
    if generator.random() < augmentation.vertical_flip:
        image, moved = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), _mirrored(moved, 1)
    if augmentation.photometric_distortion:
        image = distort_colours(image, generator)
    return image, moved, kept


def _choose_corner(
    boxes: np.ndarray, resized: tuple[int, int], size: tuple[int, int], generator: np.random.Generator
) -> tuple[int, int]:
    """Top and left of the window in the resized image; negative if the image is smaller. If the window has no box
    although the image has some, another one is tried."""
    for _ in range(CROP_TRIES):
        top, left = (
            int(generator.integers(min(0, before - after), max(0, before - after) + 1))
            for before, after in zip(resized, size, strict=True)
        )
        if not len(boxes) or _middle_inside(boxes - np.array([left, top] * 2), size).any():
            break
    return top, left


def _middle_inside(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((middles >= 0) & (middles < np.array([size[1], size[0]]))).all(axis=1)


def _part(
    image: Image.Image,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
    fill: tuple[int, ...],
) -> Image.Image:
    """The window of a given size at a position in the resized image; the rest of the image is not resized."""
    (top, left), (height, width) = corner, size
    box = (max(0, top), max(0, left), min(resized[0], top + height), min(resized[1], left + width))
    part = resize_part(image, resized, box, resample)
    if part.size == (width, height):
        return part
    whole = Image.new(image.mode, (width, height), fill if len(fill) > 1 else fill[0])
    whole.paste(part, (box[1] - left, box[0] - top))
    return whole


def _mirrored(boxes: np.ndarray, axis: int) -> np.ndarray:
    mirrored = boxes.copy()
    mirrored[:, axis], mirrored[:, axis + 2] = 1 - boxes[:, axis + 2], 1 - boxes[:, axis]
    return mirrored
