"""Rotary position embeddings of a grid, as in Vim's backbone for segmentation."""

import torch
from torch import Tensor


# Positions are scaled to a grid of this side for all image sizes: that of 224 pixels in patches of 16.
PRETRAINED_SIDE = 14
BASE = 10_000.0


def grid_rotation(grid: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """The cosines and sines that rotate the tokens of a grid: (cells, channels / 2, 2).

    The first half of the channels is rotated by the row, and the second by the column. In each half, the angle of pair
    k is the position times BASE^(-2k / (channels / 2)).
    """
    half = channels // 2
    frequencies = BASE ** (-torch.arange(0, half, 2, dtype=torch.float64, device=device) / half)
    places = [torch.arange(side, device=device, dtype=torch.float64) * PRETRAINED_SIDE / side for side in grid]
    rows, columns = (axis.flatten()[:, None] * frequencies for axis in torch.meshgrid(*places, indexing="ij"))
    angles = torch.cat([rows, columns], dim=1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate(tokens: Tensor, rotation: Tensor) -> Tensor:
    """Rotates each pair of neighbouring channels.

    Args:
        tokens: shape (batch, n, channels).
        rotation: rows of `grid_rotation`, shape (n, channels / 2, 2), optionally with a batch axis before it.
    """
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.to(tokens.dtype).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
