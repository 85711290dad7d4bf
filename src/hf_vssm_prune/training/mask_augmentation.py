"""Random augmentation of an image together with its mask, as in mmsegmentation: scale, crop, flip, colours.

No library is used: albumentations is no longer maintained, and its successor is licensed under the AGPL; kornia resizes
tensors without antialiasing, and masks as floating-point numbers.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from hf_vssm_prune.training.dense_augmentation import CROP_TRIES, Box, check_augmentation, distort_colours, resize_part


@dataclass(frozen=True)
class MaskAugmentation:
    """The augmentation of a training image and its mask.

    Attributes:
        crop_size: (height, width) of the results; smaller images are padded.
        scale: smallest and largest factor by which an image is resized.
        horizontal_flip: probability of a horizontal flip.
        photometric_distortion: whether brightness, contrast, saturation and hue are changed.
        most_of_a_class: the largest fraction of a crop's labelled pixels that a single class should cover; otherwise
            another crop is drawn, at most ten times.

    Raises:
        ValueError: a value is outside its range.
    """

    crop_size: tuple[int, int] = (512, 512)
    scale: tuple[float, float] = (0.5, 2.0)
    horizontal_flip: float = 0.5
    photometric_distortion: bool = True
    most_of_a_class: float = 0.75

    def __post_init__(self) -> None:
        check_augmentation(self, "crop_size", ("horizontal_flip", "most_of_a_class"))


def augment(
    image: Image.Image,
    mask: np.ndarray,
    size: tuple[int, int],
    resample: Image.Resampling,
    augmentation: MaskAugmentation,
    ignore_index: int,
    generator: np.random.Generator,
) -> tuple[Image.Image, np.ndarray]:
    """A part of an image and the same part of its mask, both of at most the crop's size.

    Args:
        image: of mode "L" or "RGB".
        mask: class ids (height, width).
        size: (height, width) to which the image is resized before it is scaled randomly.
        resample: filter for resizing the image.
        augmentation: what to apply.
        ignore_index: id of pixels that belong to no class.
        generator: source of all randomness.
    """
    factor = generator.uniform(*augmentation.scale)
    height, width = (max(1, round(side * factor)) for side in size)
    # The position in the resized image: the rest does not have to be resized.
    box = _choose_box(mask, (height, width), augmentation, ignore_index, generator)
    image, mask = resize_part(image, (height, width), box, resample), part_of_mask(mask, (height, width), box)
    if generator.random() < augmentation.horizontal_flip:
        image, mask = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask[:, ::-1]
    if augmentation.photometric_distortion:
        image = distort_colours(image, generator)
    return image, np.ascontiguousarray(mask)


def _choose_box(
    mask: np.ndarray,
    size: tuple[int, int],
    augmentation: MaskAugmentation,
    ignore_index: int,
    generator: np.random.Generator,
) -> Box:
    for _ in range(CROP_TRIES):
        crop_height, crop_width = (min(crop, side) for crop, side in zip(augmentation.crop_size, size, strict=True))
        top = int(generator.integers(size[0] - crop_height + 1))
        left = int(generator.integers(size[1] - crop_width + 1))
        box = (top, left, top + crop_height, left + crop_width)
        if augmentation.most_of_a_class == 1:
            break
        labels = part_of_mask(mask, size, box)
        _, counts = np.unique(labels[labels != ignore_index], return_counts=True)
        if len(counts) > 1 and counts.max() < augmentation.most_of_a_class * counts.sum():
            break
    return box


def part_of_mask(mask: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """The same part of a mask, with nearest-neighbour interpolation."""
    top, left, bottom, right = box
    rows, columns = (
        np.minimum((np.arange(first, last) + 0.5) * before / after, before - 1).astype(np.int64)
        for first, last, before, after in zip((top, left), (bottom, right), mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns]
