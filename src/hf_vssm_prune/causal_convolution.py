"""Vim's causal depthwise convolution along the sequence."""

from torch import Tensor

from .convolution_torch import causal_conv1d_torch
from .kernel_choice import kernel_for


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
    at the kept positions only.

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
        (batch, tokens, channels), in the dtype of `hidden_states`.
    """
    convolution = kernel_for("causal_conv1d", backend, hidden_states) or causal_conv1d_torch
    return convolution(hidden_states, weight, bias, reverse, kept, stand_ins)
