"""Rotary position embeddings of a grid, as in Vim's backbone for segmentation."""

import torch
from torch import Tensor


# Positions are scaled to a grid of this side for all image sizes: that of 224 pixels in patches of 16.
PRETRAINED_SIDE = 14
BASE = 10_000.0


def grid_rotation(
    grid: tuple[int, ...], channels: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The cosines and sines that rotate the tokens of a grid: (cells, channels / 2, 2).

    The first half of the channels is rotated by the row, and the second by the column. In each half, the angle of pair
    k is the position times BASE^(-2k / (channels / 2)). Angles are computed in float64 on CPUs and NVIDIA's and AMD's
    GPUs, and in `dtype` elsewhere: other devices, such as Apple's MPS, may not support float64.
    """
    half, precision = channels // 2, torch.float64 if device.type in ("cpu", "cuda") else dtype
    frequencies = BASE ** (-torch.arange(0, half, 2, dtype=precision, device=device) / half)
    places = [torch.arange(side, dtype=precision, device=device) * PRETRAINED_SIDE / side for side in grid]
    rows, columns = (axis.flatten()[:, None] * frequencies for axis in torch.meshgrid(*places, indexing="ij"))
    angles = torch.cat([rows, columns], dim=1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


def rotate(tokens: Tensor, rotation: Tensor) -> Tensor:
    """Rotates each pair of neighbouring channels.

    Args:
        tokens: shape (batch, n, channels).
        rotation: rows of `grid_rotation`, shape (n, channels / 2, 2), optionally with a batch axis before it.
    """
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.to(tokens.dtype).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
