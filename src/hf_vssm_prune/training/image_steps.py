"""Converts stored images to pixel values: decoding, and the steps of an image processor without its overhead per
call."""

import functools
import io
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers import BaseImageProcessor

from hf_vssm_prune.documentation import see


logger = logging.getLogger(__name__)
Content = TypeVar("Content")

# Slightly more than two of 255 levels: torchvision, if installed, rounds differently from Pillow when it resizes.
PROBE_TOLERANCE_IN_LEVELS = 2.5
# Above this limit, an elongated image is cropped before it is resized: a line of 60,000 pixels would take gigabytes.
MOST_RESIZED_PIXELS = 2**24
# Formats that Pillow recognises but cannot decode, or only with a program that executes the file (EPS).
UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Entries of an image processor for how pixel values are normalised, and for the size of the images.
NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
SIZES = ("do_center_crop", "crop_size", "do_resize", "size", "num_frames")
# How to transpose the pixels for each EXIF orientation.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The first clipped image. Only this one is logged, because a data set of such images would fill the log.
_said_to_be_clipped: list[str] = []


class ImageError(ValueError):
    """An image is missing, damaged, in an unknown format, has pixels of unknown range, or has no label."""


@functools.cache
def readable_formats() -> list[str]:
    """The supported image formats, in the order in which Pillow tries them: common formats first."""
    Image.preinit()
    Image.init()
    return [form for form in Image.ID if form not in UNREADABLE_FORMATS]


def decode_image(stored: Mapping[str, Any] | None, mode: str, name: str) -> Image.Image:
    """Decodes an image stored by `datasets.Image(decode=False)`, applies its EXIF orientation, and converts it to
    `mode`.

    The pixels are the same as in transformers' pipelines, which use Pillow to convert all images to RGB: transparency
    is dropped without blending, and greyscale values above 255 are clipped, which is logged. An image processor called
    directly on an image with transparency blends it onto white instead.

    Args:
        stored: {"bytes": the encoded file or None, "path": the file's path, used if there are no bytes}; None: no
            image.
        mode: "RGB" or "L".
        name: Name of the image in error messages.

    Raises:
        ImageError: The image cannot be decoded; see there.
    """
    image = read_stored(stored, name, upright)
    if image.mode.startswith("I") or image.mode == "F":
        _check_range(image, name)
    return _converted(_converted(image, "RGB"), mode)


def name_stored(kind: str, place: str, split: str, stored: Mapping[str, Any] | None) -> str:
    """What error messages call a stored image, or another kind of medium: its place in a split, and its path."""
    name = f"The {kind} in {place} of split '{split}'"
    return name if stored is None or stored["path"] is None else f"{name} ('{stored['path']}')"


def read_stored(stored: Mapping[str, Any] | None, name: str, read: Callable[[Image.Image], Content]) -> Content:
    """Returns `read(image)` for a stored image whose pixels have been loaded. See `decode_image` for arguments and
    errors."""
    stored = stored or {"bytes": None, "path": None}
    source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
    if source is None:
        raise ImageError(f"{name} has neither bytes nor a path.")
    try:
        with Image.open(source, formats=readable_formats()) as image:
            image.load()
            return read(image)
    # Pillow's readers raise OSError, SyntaxError, ValueError, EOFError, struct.error, … for damaged files.
    except Exception as error:
        raise ImageError(f"{name} cannot be read: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """A copy with the EXIF orientation applied. Like in image viewers, it is ignored if it cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # many types, as for damaged files
        orientation = None
    return image.transpose(TRANSPOSITIONS[orientation]) if orientation in TRANSPOSITIONS else image.copy()


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    # Pillow warns about palettes with transparency, which is dropped on purpose.
    image.info.pop("transparency", None)
    return image.convert(mode)


def _check_range(image: Image.Image, name: str) -> None:
    """Rejects pixels of unknown range, and logs when 16-bit values are clipped. Depending on its version and the file,
    Pillow opens 16-bit greyscale images as "I;16" or as 32-bit integers."""
    pixels = np.asarray(image)
    least, most = pixels.min(), pixels.max()
    if image.mode == "F" or least < 0 or most > 0xFFFF:
        raise ImageError(
            f"{name} has pixels of mode '{image.mode}' from {least} to {most}: convert it to 8 bits per channel."
        )
    if most > 0xFF and not _said_to_be_clipped:
        _said_to_be_clipped.append(name)
        logger.warning(
            "%s has pixels from %d to %d, which are clipped at 255, as transformers' pipelines do: convert images of "
            "16 bits to 8 bits per channel.",
            *(name, least, most),
        )


class ImageProcessorSteps:
    """The steps of an image processor that resizes, crops the centre, rescales and normalises, such as
    `CLIPImageProcessor` and `BitImageProcessor`. They can be called separately, as training does, and for small images
    they are several times as fast as the image processor.

    Attributes:
        size: (height, width) of the pixel values.
        mode: "RGB" or "L", depending on the number of means.
        resample: Filter used for resizing.
        fill: The mean colour, 0 to 255 for each channel.

    Raises:
        ValueError: The processor returns images of varying sizes, or does something other than these steps (detected by
            comparing both on two test images).
    """

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        values = image_processor.to_dict()
        self._resize_to: dict[str, int] = given_sides(values["size"]) if values.get("do_resize") else {}
        self._crops = bool(values.get("do_center_crop"))
        crop_size = given_sides(values["crop_size"]) if self._crops else {}
        fixed = crop_size or self._resize_to
        if not {"height", "width"} <= fixed.keys():
            raise ValueError(
                f"{type(image_processor).__name__} gives images of varying sizes (size={values.get('size')}, "
                f"do_center_crop={self._crops}): a model needs a size with height and width, or a center crop."
            )
        self.size = (int(fixed["height"]), int(fixed["width"]))
        if set(self._resize_to) not in (set(), {"height", "width"}, {"shortest_edge"}):
            raise ValueError(
                f"{type(image_processor).__name__} resizes to {self._resize_to}: "
                "supported are height and width, or shortest_edge."
            )
        self.resample = resampling(image_processor)

        normalizes = bool(values.get("do_normalize"))
        means = np.atleast_1d(values["image_mean"] if normalizes else [0.0] * 3).tolist()
        stds = np.atleast_1d(values["image_std"] if normalizes else [1.0] * 3).tolist()
        if len(means) not in (1, 3) or len(stds) != len(means):
            raise ValueError(f"image_mean is {means} and image_std is {stds}: each must have 1 or 3 values.")
        self.mode = "RGB" if len(means) == 3 else "L"
        self._scale = float(values["rescale_factor"]) if values.get("do_rescale") else 1.0
        # On the CPU and in float32, whatever torch's defaults are.
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None] for values in (means, stds)
        )
        self.fill = tuple(min(255, max(0, round(mean / self._scale))) for mean in means)
        self._compare_with(image_processor)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Returns the pixel values, float32 (channels, height, width), of an image in `self.mode`."""
        return self.normalize(self.resize_and_crop(image))

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Returns the image resized and cropped to `self.size`."""
        if self._resize_to:
            height, width = self._resized_size(image)
            if self._crops and height * width > MOST_RESIZED_PIXELS:
                image, (height, width) = self._cut_ends(image, height, width)
            if (width, height) != image.size:
                image = image.resize((width, height), self.resample)
        if self._crops and image.size != self.size[::-1]:
            height, width = self.size
            left, top = (image.width - width) // 2, (image.height - height) // 2
            # Outside the image, Pillow's crop is black, like the image processor's.
            image = image.crop((left, top, left + width, top + height))
        return image

    def crops(self, image: Image.Image, count: int) -> list[Image.Image]:
        """Returns `count` crops of `self.size`, evenly spaced along the image's longer side; a single crop is the
        center crop.

        Raises:
            ImageError: the image is too elongated.
        """
        if count == 1:
            return [self.resize_and_crop(image)]
        if self._resize_to:
            height, width = self._resized_size(image)
            if height * width > MOST_RESIZED_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels are too elongated for {count} crops.")
            image = image.resize((width, height), self.resample)
        height, width = self.size
        down, across = image.height - height, image.width - width
        crops = []
        for place in range(count):
            top, left = down // 2, across // 2
            if across >= down:
                left = int(place * across / (count - 1))
            else:
                top = int(place * down / (count - 1))
            crops.append(image.crop((left, top, left + width, top + height)))
        return crops

    def _cut_ends(self, image: Image.Image, height: int, width: int) -> tuple[Image.Image, tuple[int, int]]:
        """The part of an elongated image around the center crop, and the size to which this part is resized.

        It includes a few pixels on each side of the crop, which the resizing filter needs.
        """
        size, parts = [], []
        for before, after, crop in ((image.height, height, self.size[0]), (image.width, width, self.size[1])):
            kept = min(before, math.ceil((crop + 16) * before / after))
            kept += (before - kept) % 2  # remove the same number from both ends
            parts.append(((before - kept) // 2, (before + kept) // 2))
            size.append(max(1, round(kept * after / before)))
        (top, bottom), (left, right) = parts
        return image.crop((left, top, right, bottom)), (size[0], size[1])

    def normalize(self, image: Image.Image) -> torch.Tensor:
        """Returns rescaled and normalised pixel values, float32 (channels, height, width)."""
        pixels = np.array(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        values = torch.from_numpy(pixels).to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(self._scale).sub_(self._mean).div_(self._std)

    def _resized_size(self, image: Image.Image) -> tuple[int, int]:
        shortest = self._resize_to.get("shortest_edge")
        if shortest is None:
            return self._resize_to["height"], self._resize_to["width"]
        longest = int(shortest * max(image.size) / min(image.size))
        return (longest, shortest) if image.width <= image.height else (shortest, longest)

    def _compare_with(self, image_processor: BaseImageProcessor) -> None:
        generator = np.random.default_rng(0)
        tolerance = PROBE_TOLERANCE_IN_LEVELS * self._scale / float(self._std.min())
        for height, width in ((37, 53), (53, 37)):
            shape = (height, width, 3) if self.mode == "RGB" else (height, width)
            image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
            expected = image_processor(image, return_tensors="pt")["pixel_values"]
            expected = expected.flatten(0, -4)[0]  # a video processor treats the image as a single frame
            actual = self(image)
            if expected.shape != actual.shape or not torch.allclose(actual, expected, rtol=0, atol=tolerance):
                raise ValueError(
                    f"{type(image_processor).__name__} does something other than resize, crop the centre, rescale and "
                    "normalise with its size, crop_size, rescale_factor, image_mean and image_std: "
                    f"use CLIPImageProcessor or BitImageProcessor. {see('image-processor-not-supported')}"
                )


def resampling(image_processor: BaseImageProcessor) -> Image.Resampling:
    """The filter with which an image processor resizes."""
    resample = image_processor.to_dict().get("resample")
    return Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)


def given_sides(size: Mapping[str, int | None]) -> dict[str, int]:
    """The entries of an image processor's size that are not None."""
    return {name: value for name, value in size.items() if value is not None}
