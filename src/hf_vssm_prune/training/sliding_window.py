"""Segments an image window by window, for models that were trained on crops of one size."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_vssm_prune.precision import at_least_float32


def slide(
    segment: Callable[[Tensor], Tensor], images: Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """The logits of whole images, averaged where windows overlap. The last window of a row or column ends at the
    image's edge. They are added in at least float32, because half precision is too coarse for the sum of many windows.

    Args:
        segment: function from parts (batch, channels, height, width) to logits (batch, classes, height, width) of the
            same size.
        images: (batch, channels, height, width). Sides smaller than the window are taken whole.
        window: (height, width) of the window.
        stride: distance between windows, (vertical, horizontal).
    """
    boxes = window_boxes((images.shape[-2], images.shape[-1]), window, stride)
    sums, counts = None, images.new_zeros(images.shape[-2:], dtype=torch.float32)
    for top, left, bottom, right in boxes:
        logits = at_least_float32(segment(images[..., top:bottom, left:right]))
        if sums is None:
            sums = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
        sums[..., top:bottom, left:right] += logits
        counts[top:bottom, left:right] += 1
    assert sums is not None  # there is at least one window
    return sums / counts.to(sums.dtype)


def window_boxes(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """The windows over an image of a given size (height, width) as (top, left, bottom, right), row by row."""
    starts = [
        sorted({min(start, max(0, side - length)) for start in range(0, side, step)})
        for side, length, step in zip(size, window, stride, strict=True)
    ]
    ends = [
        {start: min(start + length, side) for start in found}
        for found, side, length in zip(starts, size, window, strict=True)
    ]
    return [(top, left, ends[0][top], ends[1][left]) for top in starts[0] for left in starts[1]]
