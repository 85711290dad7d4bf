"""Segmentation of an image part by part, for models that saw crops of one size in training."""

from collections.abc import Callable

from torch import Tensor


def slide(
    segment: Callable[[Tensor], Tensor], images: Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Logits of whole images: where windows overlap, their mean. The last of a row or column ends with the image.

    Args:
        segment: from parts (batch, channels, height, width) to logits (batch, classes, height, width) as large.
        images: (batch, channels, height, width); as a whole where the window is larger.
        window: its (height, width).
        stride: from one window to the next, (vertical, horizontal).
    """
    boxes = window_boxes((images.shape[-2], images.shape[-1]), window, stride)
    sums, counts = None, images.new_zeros(images.shape[-2:])
    for top, left, bottom, right in boxes:
        logits = segment(images[..., top:bottom, left:right])
        if sums is None:
            sums = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
        sums[..., top:bottom, left:right] += logits
        counts[top:bottom, left:right] += 1
    assert sums is not None  # there is a window at least
    return sums / counts.to(sums.dtype)


def window_boxes(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the windows over an image of a size (height, width), row by row."""
    starts = [
        sorted({min(start, max(0, side - length)) for start in range(0, side, step)})
        for side, length, step in zip(size, window, stride, strict=True)
    ]
    ends = [
        {start: min(start + length, side) for start in found}
        for found, side, length in zip(starts, size, window, strict=True)
    ]
    return [(top, left, ends[0][top], ends[1][left]) for top in starts[0] for left in starts[1]]
