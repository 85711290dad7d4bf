"""Converts feature maps of one resolution to the pyramid of resolutions that many heads need."""

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


# The stride of each level in pixels. If there are fewer than four levels, the last strides are used.
PYRAMID_STRIDES = (4, 8, 16, 32)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (batch, channels, height, width)."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class VimPyramid(nn.ModuleList):
    """Vim's pyramid: each level has its own feature map, which is enlarged by 2x2 deconvolutions or reduced by
    max-pooling. At most 4 levels.

    Args:
        channels: number of channels of the feature maps and of the levels.
        spacing: stride of the feature maps in pixels.
        num_levels: 1 to 4.
    """

    kind = "vim"

    def __init__(self, channels: int, spacing: int, num_levels: int) -> None:
        super().__init__(
            _resizing([channels] * (1 + _doublings(spacing, stride)), _doublings(spacing, stride), nn.BatchNorm2d)
            for stride in PYRAMID_STRIDES[-num_levels:]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [level(each) for level, each in zip(self, maps, strict=True)]


class SimplePyramid(nn.ModuleList):
    """ViTDet's simple feature pyramid (arXiv 2203.16527). All levels are computed from the last feature map: it is
    enlarged by deconvolutions that halve the channels, or reduced by max-pooling, followed by a 1x1 and a 3x3
    convolution, each with a norm.

    Args: those of `VimPyramid`.
    """

    kind = "simple"

    def __init__(self, channels: int, spacing: int, num_levels: int) -> None:
        super().__init__()
        for stride in PYRAMID_STRIDES[-num_levels:]:
            doublings = _doublings(spacing, stride)
            widths = [max(1, channels >> step) for step in range(max(0, doublings) + 1)]
            resizing = _resizing(widths, doublings, ChannelNorm)
            for kernel_size, width in ((1, widths[-1]), (3, channels)):
                convolution = nn.Conv2d(width, channels, kernel_size, padding=kernel_size // 2, bias=False)
                resizing.extend([convolution, ChannelNorm(channels)])
            self.append(resizing)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [level(maps[-1]) for level in self]


PYRAMIDS = {pyramid.kind: pyramid for pyramid in (VimPyramid, SimplePyramid)}


class MaxPool(nn.Module):
    """Max-pooling over squares; a feature map smaller than a square is pooled to a single cell."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        height, width = (min(self.size, side) for side in maps.shape[-2:])
        return F.max_pool2d(maps, (height, width))


def _doublings(spacing: int, stride: int) -> int:
    """How many times a feature map's resolution is doubled; negative: halved."""
    return round(math.log2(spacing / stride))


def _resizing(widths: list[int], doublings: int, norm: type[nn.Module]) -> nn.Sequential:
    """Doubles the resolution once for each step between widths, or halves it.

    There are a norm and a GELU between two deconvolutions.
    """
    if doublings < 0:
        return nn.Sequential(MaxPool(2**-doublings))
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        between = [norm(before), nn.GELU()] if modules else []
        modules += [*between, nn.ConvTranspose2d(before, after, 2, stride=2)]
    return nn.Sequential(*modules)


def check_pyramid(kind: str | None, spacing: int, num_levels: int) -> None:
    """Raises an error for a pyramid that is not possible.

    Raises:
        ValueError: the pyramid is unknown, the distance between patches is not a power of two, or there are too many
            levels.
    """
    if kind is None:
        return
    if kind not in PYRAMIDS:
        raise ValueError(f"`feature_pyramid` is {kind!r}; allowed values are None, {', '.join(map(repr, PYRAMIDS))}.")
    if spacing & (spacing - 1):
        raise ValueError(
            f"`feature_pyramid` {kind!r} halves and doubles feature maps: patches {spacing} pixels apart cannot give "
            f"strides of {', '.join(map(str, PYRAMID_STRIDES))}; their distance must be a power of two."
        )
    if num_levels > len(PYRAMID_STRIDES):
        raise ValueError(
            f"`feature_pyramid` {kind!r} has at most {len(PYRAMID_STRIDES)} levels; `out_features` names {num_levels}."
        )
