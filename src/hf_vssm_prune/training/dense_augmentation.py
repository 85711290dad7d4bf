"""Augmentation shared by segmentation and detection: cropping a resized image, and changing its colours."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hf_vssm_prune.training.augmentation import check_fraction


# (top, left, bottom, right) in pixels.
Box = tuple[int, int, int, int]
CROP_TRIES = 10  # until a crop shows enough of what is labelled


def check_augmentation(augmentation: Any, size: str, fractions: Sequence[str]) -> None:
    """Raises an error for a value of an augmentation that is outside its range: its size, which has this name, its
    scale, or one of the fractions."""
    height_width, scale = getattr(augmentation, size), augmentation.scale
    if len(height_width) != 2 or min(height_width) < 1:
        raise ValueError(f"{size} is {height_width}: it must be (height, width) in pixels.")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf:
        raise ValueError(f"scale is {scale}: it must satisfy 0 < smallest <= largest.")
    for name in fractions:
        check_fraction(name, getattr(augmentation, name))


def resize_part(image: Image.Image, size: tuple[int, int], box: Box, resample: Image.Resampling) -> Image.Image:
    """Resizes an image to `size` (height, width) and returns the part inside a box."""
    top, left, bottom, right = box
    vertical, horizontal = image.height / size[0], image.width / size[1]
    part = (left * horizontal, top * vertical, right * horizontal, bottom * vertical)
    return image.resize((right - left, bottom - top), resample, box=part)


def distort_colours(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """SSD's photometric distortion: brightness by up to 32 of 255, contrast and saturation by factors from 0.5 to 1.5,
    hue by up to a tenth of the circle. Each is applied with probability 0.5; contrast comes before or after the others.
    """
    pixels = np.asarray(image).astype(np.float32)
    if generator.random() < 0.5:
        pixels += generator.uniform(-32, 32)
    contrast_first, contrast = generator.random() < 0.5, generator.random() < 0.5
    factor = generator.uniform(0.5, 1.5)
    if contrast and contrast_first:
        pixels *= factor
    saturation = generator.uniform(0.5, 1.5) if generator.random() < 0.5 else 1.0
    hue = generator.uniform(-18, 18) * 255 / 180 if generator.random() < 0.5 else 0.0
    if image.mode == "RGB" and (saturation != 1.0 or hue != 0.0):
        hsv = np.asarray(Image.fromarray(_as_bytes(pixels)).convert("HSV")).astype(np.float32)
        hsv[..., 0] = (hsv[..., 0] + hue) % 255  # Pillow's 0 and 255 are the same hue
        hsv[..., 1] *= saturation
        pixels = np.asarray(Image.fromarray(_as_bytes(hsv), mode="HSV").convert("RGB")).astype(np.float32)
    if contrast and not contrast_first:
        pixels *= factor
    return Image.fromarray(_as_bytes(pixels))


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    return pixels.round().clip(0, 255).astype(np.uint8)
