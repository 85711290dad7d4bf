"""Vim's causal depthwise convolution along the sequence, computed by the kernel of the grid convolution if it fits."""

import torch.nn.functional as F
from torch import Tensor

from .convolution_torch import causal_conv1d_torch
from .kernel_choice import kernel_for


GRID_KERNEL = 7
# As many taps reach back from the middle of the grid's kernel, with the middle itself.
MOST_TAPS = GRID_KERNEL // 2 + 1


def causal_conv1d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: bool = False,
    kept: Tensor | None = None,
    stand_ins: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A depthwise convolution of each token with the ones before it (zeros before the first), followed by SiLU.

    The sequence is that of the remaining tokens or, with stand-ins, the full sequence, for which the result is needed
    at the kept positions only. A sequence is a grid with one row, on which the causal kernel is the left half of the
    middle row of a 7 x 7 kernel (its mirror image if reversed); the other rows are not used.

    Args:
        hidden_states: the remaining tokens, shape (batch, tokens, channels).
        weight: shape (channels, 1, taps); the last tap is for the token itself.
        bias: shape (channels,), or None.
        reverse: process the sequence from its end: each token with the ones after it.
        kept: with `stand_ins`, the position of each token in the full sequence, integers of shape (batch, tokens).
        stand_ins: the token seen at each position of the full sequence (a kept token at its own), integers of shape
            (batch, positions). None: only the sequence of the remaining tokens is used.
        backend: as in `selective_scan`.

    Returns:
        (batch, tokens, channels).
    """
    taps = weight.shape[-1]
    convolution = kernel_for("depthwise_conv2d", backend, hidden_states)
    if convolution is None or taps > MOST_TAPS:
        return causal_conv1d_torch(hidden_states, weight, bias, reverse, kept, stand_ins)
    middle, missing = GRID_KERNEL // 2, MOST_TAPS - taps
    row = F.pad(weight, (missing, middle))
    grid_weight = F.pad((row.flip(-1) if reverse else row).unsqueeze(2), (0, 0, middle, middle))
    places = (hidden_states if stand_ins is None else stand_ins).shape[1]
    return convolution(hidden_states, grid_weight, bias, (1, places), kept, True, stand_ins)
