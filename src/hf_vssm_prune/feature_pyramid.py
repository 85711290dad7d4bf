"""From maps of one resolution, as these models have them, to the pyramid that many heads want."""

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


# Pixels from one cell to the next at each level; of fewer levels than four the last ones.
PYRAMID_STRIDES = (4, 8, 16, 32)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (batch, channels, height, width)."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class VimPyramid(nn.ModuleList):
    """Vim's: each level of its own map, enlarged by 2x2 deconvolutions or shrunk by max-pooling; 4 levels at most.

    Args:
        channels: of the maps, and of the levels.
        spacing: pixels from one cell of the maps to the next.
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
    """ViTDet's simple feature pyramid (arXiv 2203.16527): all levels of the last map, each enlarged by deconvolutions
    that halve the channels or shrunk by max-pooling, then a 1x1 and a 3x3 convolution, each with a norm.

    Args: as of `VimPyramid`.
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
    """Max-pooling over squares; a map that is smaller than one is pooled whole."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        height, width = (min(self.size, side) for side in maps.shape[-2:])
        return F.max_pool2d(maps, (height, width))


def _doublings(spacing: int, stride: int) -> int:
    """How often a map's resolution is doubled; negative: halved."""
    return round(math.log2(spacing / stride))


def _resizing(widths: list[int], doublings: int, norm: type[nn.Module]) -> nn.Sequential:
    """Doubles the resolution as often as there are steps between widths, or halves it.

    Between two deconvolutions come a norm and GELU.
    """
    if doublings < 0:
        return nn.Sequential(MaxPool(2**-doublings))
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        between = [norm(before), nn.GELU()] if modules else []
        modules += [*between, nn.ConvTranspose2d(before, after, 2, stride=2)]
    return nn.Sequential(*modules)


def check_pyramid(kind: str | None, spacing: int, num_levels: int) -> None:
    """Refuses a pyramid that cannot be made.

    Raises:
        ValueError: there is no such one, patches do not lie a power of two apart, or there are too many levels.
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
