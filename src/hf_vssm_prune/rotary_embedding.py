"""Rotary position embeddings of a grid, as Vim's backbone for segmentation has them."""

import torch
from torch import Tensor


# The grid that positions are measured on, whatever the image's: that of 224 pixels in patches of 16.
PRETRAINED_SIDE = 14
BASE = 10_000.0


def grid_rotation(grid: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """Cosines and sines by which the tokens of a grid are turned: (cells, channels / 2, 2).

    The first half of the channels turns by the row, the second by the column; in each, pair k by the position times
    BASE^(-2k / (channels / 2)).
    """
    half = channels // 2
    frequencies = BASE ** (-torch.arange(0, half, 2, dtype=torch.float64, device=device) / half)
    places = [torch.arange(side, device=device, dtype=torch.float64) * PRETRAINED_SIDE / side for side in grid]
    rows, columns = (axis.flatten()[:, None] * frequencies for axis in torch.meshgrid(*places, indexing="ij"))
    angles = torch.cat([rows, columns], dim=1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate(tokens: Tensor, rotation: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels.

    Args:
        tokens: shape (batch, n, channels).
        rotation: rows of `grid_rotation`, shape (n, channels / 2, 2) or with a batch before it.
    """
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.to(tokens.dtype).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
