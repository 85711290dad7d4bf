"""Depthwise convolution on the patch grid, when only some of its cells still have a token."""

from torch import Tensor

from .convolution_torch import depthwise_conv2d_torch
from .kernel_choice import kernel_for


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
    """Same-size depthwise convolution over the full grid, evaluated at kept cells only. A dropped cell is treated as
    zero, or as the token that stands in for it.

    Args:
        hidden_states: the remaining tokens, in raster order, shape (batch, tokens, channels).
        weight: shape (channels, 1, kernel, kernel), kernel odd.
        bias: shape (channels,), or None.
        grid: (height, width) of the full grid.
        kept: the cell of each token, at most height * width of them, integers of shape (batch, tokens). None: every
            cell.
        silu: apply SiLU to the result.
        stand_ins: the token seen in each cell (a kept token in its own), integers of shape (batch, height * width).
            None: zero in dropped cells.
        backend: as in `selective_scan`.

    Returns:
        (batch, tokens, channels), in the dtype of `hidden_states`.
    """
    convolution = kernel_for("depthwise_conv2d", backend, hidden_states) or depthwise_conv2d_torch
    return convolution(hidden_states, weight, bias, grid, kept, silu, stand_ins)
