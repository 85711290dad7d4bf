"""Depthwise convolution on the patch grid when only some of its cells still hold a token."""

import torch.nn.functional as F
from torch import Tensor

from .selective_scan import kernel_for
from .token_pruning import gather_tokens


def depthwise_conv2d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    kept: Tensor | None = None,
    silu: bool = False,
    stand_ins: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Same-size depthwise convolution over the full grid, evaluated at kept cells only. A dropped cell counts as zero,
    or as the token that stands in for it.

    Args:
        hidden_states: the tokens that are left, in raster order, shape (batch, tokens, channels).
        weight: shape (channels, 1, kernel, kernel), kernel odd.
        bias: shape (channels,), or None.
        grid: (height, width) of the full grid.
        kept: the cell of each token, height * width at most, int64 of shape (batch, tokens). None: every cell.
        silu: apply SiLU to the result.
        stand_ins: the token seen in each cell, its own in a kept one, int64 of shape (batch, height * width). None:
            zero in dropped cells.
        backend: as in `selective_scan`.

    Returns:
        (batch, tokens, channels).
    """
    convolution = kernel_for("depthwise_conv2d", backend, hidden_states) or depthwise_conv2d_torch
    return convolution(hidden_states, weight, bias, grid, kept, silu, stand_ins)


def depthwise_conv2d_torch(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    kept: Tensor | None = None,
    silu: bool = False,
    stand_ins: Tensor | None = None,
) -> Tensor:
    """The reference that every kernel is checked against; arguments and result as in `depthwise_conv2d`."""
    index = None if kept is None else kept.unsqueeze(-1).expand_as(hidden_states)
    cells = hidden_states
    if stand_ins is not None:
        cells = gather_tokens(hidden_states, stand_ins.long())
    elif index is not None:
        empty = hidden_states.new_zeros(hidden_states.shape[0], grid[0] * grid[1], hidden_states.shape[2])
        cells = empty.scatter(1, index, hidden_states)
    image = cells.transpose(1, 2).unflatten(2, grid)
    image = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    cells = image.flatten(2).transpose(1, 2)
    if index is not None:
        cells = cells.gather(1, index)
    return F.silu(cells) if silu else cells
