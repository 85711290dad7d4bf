"""What the convolutions' kernels share: the arguments as one tuple, their checks, and the way to a PyTorch operator."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .convolution_torch import causal_conv1d_torch, depthwise_conv2d_torch
from .plain_fallback import plain_gradients, wants_plain_gradients
from .scan_operator import NAMESPACE


class ConvolutionArguments(NamedTuple):
    """What `depthwise_conv2d` takes, or, for a grid of one row, `causal_conv1d`.

    Attributes:
        weight: shape (channels, 1, kernel, kernel), kernel odd; looking one way (channels, 1, taps).
        height, width: of the full grid; looking one way 1 and the full sequence's length.
        looks: 0: around; looking one way, 1: at the tokens before, as a causal convolution; -1: at those behind.
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
        """From the arguments of `hf_vssm_prune.grid_convolution.depthwise_conv2d`."""
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
        """From the arguments of `hf_vssm_prune.causal_convolution.causal_conv1d`."""
        places = (hidden_states if stand_ins is None else stand_ins).shape[1]
        return cls(hidden_states, weight, bias, kept, stand_ins, 1, places, True, -1 if reverse else 1)

    def check(self) -> None:
        """Check that the shapes fit together and that all tensors are on one device.

        Raises:
            ValueError: a tensor does not fit; the message names it.
        """
        batch, tokens, channels = self.hidden_states.shape
        height, width, kernel = self.height, self.width, self.weight.shape[-1]
        if self.looks == 0 and kernel % 2 == 0:
            raise ValueError(f"the kernel must have an odd size, got {kernel}.")
        if self.kept is None and tokens != height * width:
            raise ValueError(f"a grid of {height} x {width} has {height * width} tokens, got {tokens}; pass `kept`.")
        expected = {
            "weight": (channels, 1, kernel) if self.looks else (channels, 1, kernel, kernel),
            "bias": (channels,),
            "kept": (batch, tokens),
            "stand_ins": (batch, height * width),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.device != self.hidden_states.device:
                raise ValueError(
                    f"`{name}` is on the device {tensor.device}, `hidden_states` on {self.hidden_states.device}."
                )
            if tensor.shape != shape:
                raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(tensor.shape)}.")


SCHEMA = (
    "Tensor hidden_states, Tensor weight, Tensor? bias, Tensor? kept, Tensor? stand_ins, "
    "int height, int width, bool silu, int looks"
)


def convolution_operator(
    name: str,
    forward: Callable[[ConvolutionArguments], Tensor],
    backward: Callable[[ConvolutionArguments, Tensor], Sequence[Tensor]],
    device_types: str | None = None,
) -> Callable[..., Tensor]:
    """Registers a convolution as a PyTorch operator with its gradient and its fake kernel, for autograd, compile and
    export.

    Args:
        name: of the operator, in `NAMESPACE`.
        forward: from arguments that have been checked to the output. Is not called for an empty one.
        backward: from the arguments and the output's gradient to the gradients of `hidden_states`, `weight` and, if
            there is one, `bias`, of any precision. Is not called for an empty output.
        device_types: on which it runs; None: on any.

    Returns:
        The operator: takes the fields of `ConvolutionArguments` in their order.
    """

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}", mutates_args=(), schema=f"({SCHEMA}) -> Tensor", device_types=device_types
    )
    def operator(*inputs: Any) -> Tensor:
        arguments = ConvolutionArguments(*inputs)
        arguments.check()
        if arguments.hidden_states.numel() == 0:
            return arguments.hidden_states.new_empty(arguments.hidden_states.shape)
        return forward(arguments)

    @operator.register_fake
    def _(hidden_states: Tensor, *_others: Any) -> Tensor:
        return hidden_states.new_empty(hidden_states.shape)

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad_output, {SCHEMA}) -> Tensor[]",
        device_types=device_types,
    )
    def operator_backward(grad_output: Tensor, *inputs: Any) -> list[Tensor]:
        arguments = ConvolutionArguments(*inputs)
        wanted = [tensor for tensor in arguments[:3] if tensor is not None]
        if grad_output.numel() == 0:
            return [tensor.new_zeros(tensor.shape) for tensor in wanted]
        gradients = backward(arguments, grad_output)
        return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, wanted, strict=True)]

    @operator_backward.register_fake
    def _(grad_output: Tensor, *inputs: Any) -> list[Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor in inputs[:3] if tensor is not None]

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        arguments = ConvolutionArguments(*inputs)
        ctx.save_for_backward(*arguments[:5])
        ctx.options = arguments[5:]

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors, *ctx.options)
        if wants_plain_gradients(grad_output):
            return tuple(plain_gradients(_convolve_torch, inputs, grad_output))
        grad_hidden_states, grad_weight, *grad_bias = operator_backward(grad_output, *inputs)
        return grad_hidden_states, grad_weight, grad_bias[0] if grad_bias else None, *(None,) * 6

    operator.register_autograd(differentiate, setup_context=save_inputs)
    return operator


def _convolve_torch(*inputs: Any) -> Tensor:
    a = ConvolutionArguments(*inputs)
    if a.looks:
        return causal_conv1d_torch(a.hidden_states, a.weight, a.bias, a.looks < 0, a.kept, a.stand_ins)
    return depthwise_conv2d_torch(a.hidden_states, a.weight, a.bias, (a.height, a.width), a.kept, a.silu, a.stand_ins)
