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
    """SiLU of a depthwise convolution of each token with the ones before it, and zeros before the first.

    The sequence is that of the tokens that are left, or, with stand-ins, the full one, of which the result is needed at
    the kept places only.

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
    convolution = kernel_for("causal_conv1d", backend, hidden_states) or causal_conv1d_torch
    return convolution(hidden_states, weight, bias, reverse, kept, stand_ins)
