"""The common part of the convolution kernels: the arguments as one tuple, their checks, and the operator."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .convolution_torch import causal_conv1d_torch, depthwise_conv2d_torch
from .kernel_operator import check_tensors, kernel_operator


class ConvolutionArguments(NamedTuple):
    """Arguments of `depthwise_conv2d` or, for a grid with one row, of `causal_conv1d`.

    Attributes:
        weight: shape (channels, 1, kernel, kernel) with an odd kernel; for a causal convolution (channels, 1, taps).
        height, width: size of the full grid; for a causal convolution, 1 and the length of the full sequence.
        looks: 0: the window is centred; 1: causal convolution over the token and those before it; -1: over the token
            and those after it.
    """

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None
    kept: Tensor | None
    stand_ins: Tensor | None
    height: int
    width: int
    silu: bool
    looks: int = 0

    @classmethod
    def on_grid(
        cls,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grid: tuple[int, int],
        kept: Tensor | None = None,
        silu: bool = False,
        stand_ins: Tensor | None = None,
    ) -> "ConvolutionArguments":
        """Creates it from the arguments of `hf_vssm_prune.grid_convolution.depthwise_conv2d`."""
        return cls(hidden_states, weight, bias, kept, stand_ins, *grid, silu)

    @classmethod
    def along_sequence(
        cls,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        reverse: bool = False,
        kept: Tensor | None = None,
        stand_ins: Tensor | None = None,
    ) -> "ConvolutionArguments":
        """Creates it from the arguments of `hf_vssm_prune.causal_convolution.causal_conv1d`."""
        places = (hidden_states if stand_ins is None else stand_ins).shape[1]
        return cls(hidden_states, weight, bias, kept, stand_ins, 1, places, True, -1 if reverse else 1)

    def check(self) -> None:
        """Checks that the shapes fit together and that all tensors are on one device.

        Raises:
            ValueError: a tensor does not fit; the message names it.
        """
        batch, tokens, channels = self.hidden_states.shape
        height, width, kernel = self.height, self.width, self.weight.shape[-1]
        if self.looks == 0 and kernel % 2 == 0:
            raise ValueError(f"the kernel must have an odd size, got {kernel}.")
        if self.kept is None and tokens != height * width:
            raise ValueError(f"a grid of {height} x {width} has {height * width} tokens, got {tokens}; pass `kept`.")
        shapes: dict[str, Sequence[tuple[int, ...]]] = {
            "weight": [(channels, 1, kernel) if self.looks else (channels, 1, kernel, kernel)],
            "bias": [(channels,)],
            "kept": [(batch, tokens)],
            "stand_ins": [(batch, height * width)],
        }
        check_tensors(self, shapes)


def convolution_operator(
    name: str,
    forward: Callable[[ConvolutionArguments], Tensor],
    backward: Callable[[ConvolutionArguments, Tensor], Sequence[Tensor]],
    device_types: str | None = None,
) -> Callable[..., Tensor]:
    """A convolution as a PyTorch operator; for arguments and result, see `kernel_operator`."""
    return kernel_operator(name, ConvolutionArguments, _convolve_torch, forward, backward, device_types)


def _convolve_torch(*inputs: Any) -> Tensor:
    a = ConvolutionArguments(*inputs)
    if a.looks:
        return causal_conv1d_torch(a.hidden_states, a.weight, a.bias, a.looks < 0, a.kept, a.stand_ins)
    return depthwise_conv2d_torch(a.hidden_states, a.weight, a.bias, (a.height, a.width), a.kept, a.silu, a.stand_ins)
