"""Vim's causal depthwise convolution along the sequence, with the kernel of the grid's convolution where it fits."""

import torch.nn.functional as F
from torch import Tensor

from .selective_scan import kernel_for


GRID_KERNEL = 7
# As many taps reach back from the middle of the grid's kernel, with the middle itself.
MOST_TAPS = GRID_KERNEL // 2 + 1


def causal_conv1d(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """SiLU of a depthwise convolution of each token with the ones before it, and zeros before the first.

    A sequence is a grid of one row. There the causal kernel is the left half of the middle row of a 7 x 7 kernel,
    reversed its mirror image, and the other rows are not looked at.

    Args:
        hidden_states: shape (batch, tokens, channels).
        weight: shape (channels, 1, taps), the last of which is for the token itself.
        bias: shape (channels,), or None.
        reverse: go through the sequence from its end: each token with the ones behind it.
        backend: as in `selective_scan`.

    Returns:
        (batch, tokens, channels).
    """
    taps = weight.shape[-1]
    convolution = kernel_for("depthwise_conv2d", backend, hidden_states)
    if convolution is None or taps > MOST_TAPS:
        return causal_conv1d_torch(hidden_states, weight, bias, reverse)
    middle, missing = GRID_KERNEL // 2, MOST_TAPS - taps
    row = F.pad(weight, (missing, middle))
    grid_weight = F.pad((row.flip(-1) if reverse else row).unsqueeze(2), (0, 0, middle, middle))
    return convolution(hidden_states, grid_weight, bias, (1, hidden_states.shape[1]), None, True)


def causal_conv1d_torch(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool = False) -> Tensor:
    """The reference; arguments and result as in `causal_conv1d`."""
    if reverse:
        return causal_conv1d_torch(hidden_states.flip(1), weight, bias).flip(1)
    channels, _, taps = weight.shape
    sequence = F.conv1d(hidden_states.transpose(1, 2), weight, bias, padding=taps - 1, groups=channels)
    return F.silu(sequence[..., : hidden_states.shape[1]]).transpose(1, 2)
