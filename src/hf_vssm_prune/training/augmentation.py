"""Training augmentation without torchvision: random crops, RandAugment and random erasing for single images, mixup and
CutMix for batches. All of it follows timm's definitions, with which the published vision Mambas were trained.

All randomness comes from the `numpy.random.Generator` passed to each function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps


@dataclass(frozen=True)
class AugmentationConfig:
    """Augmentation of a training image. The defaults are DeiT's, which Vim and PlainMamba also use (timm's `--aa
    rand-m9-mstd0.5-inc1 --reprob 0.25`).

    Attributes:
        random_resized_crop_scale: Smallest and largest fraction of the image's area covered by the random crop, which
            is then resized; None: the image processor's own resizing and center crop.
        random_crop_padding: Width in pixels of the black border added before a random crop to the final size, as is
            usual for small images. Cannot be combined with `random_resized_crop_scale`.
        horizontal_flip: Probability of mirroring the image.
        randaugment_num_ops: Number of operations drawn per image, each applied with probability 0.5; 0: no RandAugment.
        randaugment_magnitude: Mean magnitude of an operation, 0 to 10.
        randaugment_magnitude_std: Standard deviation of the magnitude.
        random_erasing: Probability of replacing a rectangle with noise.

    Raises:
        ValueError: A value is outside its range, or both kinds of random crop are set.
    """

    random_resized_crop_scale: tuple[float, float] | None = (0.08, 1.0)
    random_crop_padding: int = 0
    horizontal_flip: float = 0.5
    randaugment_num_ops: int = 2
    randaugment_magnitude: float = 9.0
    randaugment_magnitude_std: float = 0.5
    random_erasing: float = 0.25

    def __post_init__(self) -> None:
        scale = self.random_resized_crop_scale
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(
                f"random_resized_crop_scale is {scale}: it must be None, or satisfy 0 < smallest <= largest <= 1."
            )
        if self.random_crop_padding < 0:
            raise ValueError(f"random_crop_padding is {self.random_crop_padding}: it must not be negative.")
        if self.random_crop_padding and scale is not None:
            raise ValueError(
                f"random_crop_padding ({self.random_crop_padding}) and random_resized_crop_scale ({scale}) cannot "
                "be combined: set random_crop_padding to 0 or random_resized_crop_scale to None."
            )
        check_fraction("horizontal_flip", self.horizontal_flip)
        check_fraction("random_erasing", self.random_erasing)
        if self.randaugment_num_ops < 0:
            raise ValueError(f"randaugment_num_ops is {self.randaugment_num_ops}: it must not be negative.")
        if not 0 <= self.randaugment_magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"randaugment_magnitude is {self.randaugment_magnitude}: it must be from 0 to 10.")
        if not 0 <= self.randaugment_magnitude_std < math.inf:
            raise ValueError(f"randaugment_magnitude_std is {self.randaugment_magnitude_std}: it must not be negative.")


def check_fraction(name: str, value: float) -> None:
    """Raises an error for a value that is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it must be from 0 to 1.")


# Random crops


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    scale: tuple[float, float],
    resample: Image.Resampling,
    generator: np.random.Generator,
) -> Image.Image:
    """Crops a rectangle of random area and aspect ratio (3:4 to 4:3) and resizes it to `size` (height, width).

    If ten draws do not fit into the image, the largest centred rectangle within these ratios is used, as in
    torchvision.
    """
    width, height = image.size
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(math.log(low), math.log(high)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            top = int(generator.integers(height - crop_height + 1))
            break
    else:
        crop_width = min(width, max(1, round(height * high)))
        crop_height = min(height, max(1, round(width / low)))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return image.crop((left, top, left + crop_width, top + crop_height)).resize(size[::-1], resample)


def random_crop_with_padding(image: Image.Image, padding: int, generator: np.random.Generator) -> Image.Image:
    """Shifts the image by up to `padding` pixels in each direction; the uncovered border is black."""
    left, top = (int(shift) for shift in generator.integers(-padding, padding + 1, size=2))
    return image.crop((left, top, left + image.width, top + image.height))


# RandAugment (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719), with the operations of timm's `inc1`: each of them
# gets stronger with the magnitude.

MAX_MAGNITUDE = 10
APPLICATION_PROBABILITY = 0.5


@dataclass(frozen=True)
class _Operation:
    """An operation on an image. `argument(strength, sign)` converts a strength from 0 to 1 and a random sign to the
    argument of `apply(image, argument, geometry)`, where `geometry` contains Pillow's keyword arguments for resampling
    and filling."""

    argument: Callable[[float, int], float]
    apply: Callable[[Image.Image, float, dict[str, Any]], Image.Image]


def _shear_x(image: Image.Image, factor: float, geometry: dict[str, Any]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, factor, 0, 0, 1, 0), **geometry)


def _shear_y(image: Image.Image, factor: float, geometry: dict[str, Any]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, factor, 1, 0), **geometry)


def _translate_x(image: Image.Image, fraction: float, geometry: dict[str, Any]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, fraction * image.width, 0, 1, 0), **geometry)


def _translate_y(image: Image.Image, fraction: float, geometry: dict[str, Any]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, fraction * image.height), **geometry)


def _rotate(image: Image.Image, degrees: float, geometry: dict[str, Any]) -> Image.Image:
    return image.rotate(degrees, **geometry)


def _solarize_add(image: Image.Image, addend: float, geometry: dict[str, Any]) -> Image.Image:
    table = [min(255, value + int(addend)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(enhancer: Callable[[Image.Image], Any]) -> _Operation:
    return _Operation(
        lambda strength, sign: max(0.1, 1 + sign * 0.9 * strength),
        lambda image, factor, geometry: enhancer(image).enhance(factor),
    )


def _without_strength(function: Callable[[Image.Image], Image.Image]) -> _Operation:
    return _Operation(lambda strength, sign: 0.0, lambda image, argument, geometry: function(image))


RANDAUGMENT_OPERATIONS: dict[str, _Operation] = {
    "auto_contrast": _without_strength(ImageOps.autocontrast),
    "equalize": _without_strength(ImageOps.equalize),
    "invert": _without_strength(ImageOps.invert),
    "rotate": _Operation(lambda strength, sign: sign * 30 * strength, _rotate),
    "posterize": _Operation(
        # At full strength timm keeps no bits, which gives a black image; Pillow rejects this.
        lambda strength, sign: max(1, 4 - int(4 * strength)),
        lambda image, bits, geometry: ImageOps.posterize(image, int(bits)),
    ),
    "solarize": _Operation(
        lambda strength, sign: 256 - int(256 * strength),
        lambda image, threshold, geometry: ImageOps.solarize(image, int(threshold)),
    ),
    "solarize_add": _Operation(lambda strength, sign: int(110 * strength), _solarize_add),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _Operation(lambda strength, sign: sign * 0.3 * strength, _shear_x),
    "shear_y": _Operation(lambda strength, sign: sign * 0.3 * strength, _shear_y),
    "translate_x": _Operation(lambda strength, sign: sign * 0.45 * strength, _translate_x),
    "translate_y": _Operation(lambda strength, sign: sign * 0.45 * strength, _translate_y),
}


def randaugment(
    image: Image.Image,
    config: AugmentationConfig,
    resample: Image.Resampling,
    fill: tuple[int, ...],
    generator: np.random.Generator,
) -> Image.Image:
    """Applies `config.randaugment_num_ops` random operations, drawn with replacement.

    Args:
        image: Image in mode "L" or "RGB".
        resample: Filter for the geometric operations. Pillow supports nearest, bilinear and bicubic here; bicubic is
            used in place of any other.
        fill: The colour (0 to 255, for each channel) of areas that a geometric operation uncovers.
    """
    if resample not in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR):
        resample = Image.Resampling.BICUBIC
    geometry = {"resample": resample, "fillcolor": fill if len(fill) > 1 else fill[0]}
    operations = list(RANDAUGMENT_OPERATIONS.values())
    for choice in generator.integers(len(operations), size=config.randaugment_num_ops):
        if generator.random() >= APPLICATION_PROBABILITY:
            continue
        magnitude = generator.normal(config.randaugment_magnitude, config.randaugment_magnitude_std)
        strength = min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
        sign = 1 if generator.random() < 0.5 else -1
        operation = operations[choice]
        image = operation.apply(image, operation.argument(strength, sign), geometry)
    return image


# Random erasing (Zhong et al., 2020, https://arxiv.org/abs/1708.04896)


def random_erasing(pixel_values: torch.Tensor, probability: float, generator: np.random.Generator) -> torch.Tensor:
    """With probability `probability`, replaces a rectangle (2% to 33% of the area, aspect ratio 0.3 to 3.3) of
    normalised pixel values (channels, height, width) with standard normal noise, in place. If ten draws do not fit, the
    image is unchanged."""
    if generator.random() >= probability:
        return pixel_values
    channels, height, width = pixel_values.shape
    for _ in range(10):
        area = height * width * generator.uniform(0.02, 1 / 3)
        ratio = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        erased_height, erased_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < erased_height < height and 0 < erased_width < width:
            top = int(generator.integers(height - erased_height + 1))
            left = int(generator.integers(width - erased_width + 1))
            noise = generator.standard_normal((channels, erased_height, erased_width), dtype=np.float32)
            pixel_values[:, top : top + erased_height, left : left + erased_width] = torch.from_numpy(noise)
            break
    return pixel_values


# Mixup (Zhang et al., 2018, https://arxiv.org/abs/1710.09412), CutMix (Yun et al., 2019, https://arxiv.org/abs/1905.04899)


@dataclass(frozen=True)
class MixConfig:
    """How the images of a batch are mixed. The defaults are those of the paper's fine-tuning.

    Attributes:
        mixup_alpha: Both parameters of the Beta distribution of mixup's weight; 0: no mixup.
        cutmix_alpha: The same for CutMix; 0: no CutMix.
        probability: Probability of mixing a batch.
        switch_probability: Probability of CutMix instead of mixup if both are on.
        label_smoothing: Fraction of each label that is spread evenly over all classes, whether the batch is mixed or
            not.

    Raises:
        ValueError: A value is outside its range.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    probability: float = 1.0
    switch_probability: float = 0.5
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative.")
        for name in ("probability", "switch_probability", "label_smoothing"):
            check_fraction(name, getattr(self, name))


def mix_batch(
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    config: MixConfig,
    generator: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixes image i of a batch with image (batch - 1 - i). The whole batch shares one weight, which is timm's default.

    Args:
        pixel_values: (batch, channels, height, width). Not modified.
        labels: (batch,), integers from 0 to `num_labels` - 1.
        generator: Source of the weight and the rectangle.

    Returns:
        The mixed pixel values, and soft labels (batch, num_labels) in float32; each row sums to 1.

    Raises:
        ValueError: A label is out of range.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        raise ValueError(
            f"labels go from {int(labels.min())} to {int(labels.max())}: allowed labels are 0 to {num_labels - 1}."
        )
    mixed, weight = _mix_pixel_values(pixel_values, config, generator)
    spread = config.label_smoothing / num_labels
    soft_labels = torch.full((len(labels), num_labels), spread, dtype=torch.float32, device=labels.device)
    soft_labels.scatter_(1, labels[:, None].long(), 1 - config.label_smoothing + spread)
    return mixed, torch.lerp(soft_labels.flip(0), soft_labels, weight)


def _mix_pixel_values(
    pixel_values: torch.Tensor, config: MixConfig, generator: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """Returns the mixed batch, and the fraction of each mixed image that comes from the original image."""
    if not (config.mixup_alpha or config.cutmix_alpha) or generator.random() >= config.probability:
        return pixel_values, 1.0
    if config.mixup_alpha and config.cutmix_alpha:
        use_cutmix = generator.random() < config.switch_probability
    else:
        use_cutmix = config.cutmix_alpha > 0
    if use_cutmix:
        return _cutmix(pixel_values, generator.beta(config.cutmix_alpha, config.cutmix_alpha), generator)
    weight = generator.beta(config.mixup_alpha, config.mixup_alpha)
    return torch.lerp(pixel_values.flip(0), pixel_values, weight), weight


def _cutmix(pixel_values: torch.Tensor, weight: float, generator: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Pastes a rectangle whose area is the fraction 1 - `weight` of the image, with a uniformly drawn centre. The part
    outside the image is lost, so the fraction used for the labels is measured afterwards."""
    height, width = pixel_values.shape[-2:]
    side = math.sqrt(1 - weight)
    top, bottom = _span_around(int(generator.integers(height)), int(height * side), height)
    left, right = _span_around(int(generator.integers(width)), int(width * side), width)
    mixed = pixel_values.clone()
    mixed[..., top:bottom, left:right] = pixel_values.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _span_around(center: int, length: int, limit: int) -> tuple[int, int]:
    return max(0, center - length // 2), min(limit, center + length // 2)
