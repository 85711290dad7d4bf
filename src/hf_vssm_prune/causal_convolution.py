"""Vim's causal depthwise convolution along the sequence, with the kernel of the grid's convolution where it fits."""

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
    """SiLU of a depthwise convolution of each token with the ones before it, and zeros before the first.

    The sequence is that of the tokens that are left, or, with stand-ins, the full one, of which the result is needed at
    the kept places only. A sequence is a grid of one row. There the causal kernel is the left half of the middle row of
    a 7 x 7 kernel, reversed its mirror image, and the other rows are not looked at.

    Args:
        hidden_states: the tokens that are left, shape (batch, tokens, channels).
        weight: shape (channels, 1, taps), the last of which is for the token itself.
        bias: shape (channels,), or None.
        reverse: go through the sequence from its end: each token with the ones behind it.
        kept: with `stand_ins` the place of each token in the full sequence, integers of shape (batch, tokens).
        stand_ins: the token seen at each place of the full sequence, its own in a kept one, integers of shape (batch,
            places). None: there is no sequence but that of the tokens that are left.
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
