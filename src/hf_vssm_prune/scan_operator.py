"""What the scan's kernels share: the arguments as one tuple, their checks, and the way to a PyTorch operator."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plain_fallback import plain_gradients, wants_plain_gradients
from .selective_scan_torch import selective_scan_torch


class ScanArguments(NamedTuple):
    """What `hf_vssm_prune.selective_scan.selective_scan` takes, in its order."""

    hidden_states: Tensor
    time_step: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    time_step_bias: Tensor
    gate: Tensor | None = None
    order: Tensor | None = None
    gaps: Tensor | None = None
    hole_time_step: Tensor | None = None
    direction_B: Tensor | None = None
    moves: Tensor | None = None

    def num_paths(self) -> int:
        return 1 if self.order is None else self.order.shape[1]

    def check(self) -> None:
        """Check that the shapes fit together and that all tensors are on one device.

        Raises:
            ValueError: a tensor does not fit; the message names it.
        """
        batch, length, channels = self.hidden_states.shape
        states, device = self.A.shape[-1], self.hidden_states.device
        by_token, by_state, by_channel = (batch, length, channels), (batch, length, states), (channels,)
        by_path = (batch, self.num_paths(), length)
        move_kinds = 0 if self.direction_B is None else self.direction_B.shape[0]
        expected = {
            "hidden_states": by_token,
            "time_step": by_token,
            "A": (channels, states),
            "B": by_state,
            "C": by_state,
            "D": by_channel,
            "time_step_bias": by_channel,
            "gate": by_token,
            "order": by_path,
            "gaps": by_path,
            "hole_time_step": by_channel,
            "direction_B": (move_kinds, states),
            "moves": by_path,
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.device != device:
                raise ValueError(f"`{name}` is on the device {tensor.device}, `hidden_states` on {device}.")
            shapes = (shape, (1, *shape[1:])) if shape is by_path else (shape,)
            if tensor.shape not in shapes:
                raise ValueError(
                    f"`{name}` must have the shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}."
                )


# Each Hub repository's code is a module of its own, and registers operators of its own.
NAMESPACE = "hf_vssm_prune" if __package__ == "hf_vssm_prune" else f"hub_{zlib.crc32(__name__.encode()):08x}"

SCHEMA = (
    "Tensor hidden_states, Tensor time_step, Tensor A, Tensor B, Tensor C, Tensor D, Tensor time_step_bias, "
    "Tensor? gate, Tensor? order, Tensor? gaps, Tensor? hole_time_step, Tensor? direction_B, Tensor? moves"
)


def scan_operator(
    name: str,
    forward: Callable[[ScanArguments], Tensor],
    backward: Callable[[ScanArguments, Tensor], Sequence[Tensor]],
    device_types: str | None = None,
) -> Callable[..., Tensor]:
    """Registers a scan as a PyTorch operator with its gradient and its fake kernel, for autograd, compile and export.

    Args:
        name: of the operator, in `NAMESPACE`.
        forward: from arguments that have been checked to the output. Is not called for an empty one.
        backward: from the arguments and the output's gradient to the gradients of the floating-point arguments that are
            given, in their order. Is not called for an empty output.
        device_types: on which it runs; None: on any.

    Returns:
        The operator: takes the fields of `ScanArguments` in their order.
    """

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}", mutates_args=(), schema=f"({SCHEMA}) -> Tensor", device_types=device_types
    )
    def operator(*inputs: Any) -> Tensor:
        arguments = ScanArguments(*inputs)
        arguments.check()
        if arguments.hidden_states.numel() == 0:
            return torch.empty_like(arguments.hidden_states)
        return forward(arguments)

    @operator.register_fake
    def _(hidden_states: Tensor, *_others: Tensor | None) -> Tensor:
        return hidden_states.new_empty(hidden_states.shape)

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad_output, {SCHEMA}) -> Tensor[]",
        device_types=device_types,
    )
    def operator_backward(grad_output: Tensor, *inputs: Any) -> list[Tensor]:
        if grad_output.numel() == 0:
            return [torch.zeros_like(tensor) for tensor in _floating(inputs)]
        gradients = backward(ScanArguments(*inputs), grad_output)
        return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, _floating(inputs), strict=True)]

    @operator_backward.register_fake
    def _(grad_output: Tensor, *inputs: Tensor | None) -> list[Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor in _floating(inputs)]

    def save_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # once: under gradient checkpointing they are computed when they are asked for
        if wants_plain_gradients(grad_output):
            return tuple(plain_gradients(selective_scan_torch, inputs, grad_output))
        gradients = iter(operator_backward(grad_output, *inputs))
        return tuple(next(gradients) if _is_floating(tensor) else None for tensor in inputs)

    operator.register_autograd(differentiate, setup_context=save_inputs)
    return operator


def to_float32(tensor: Tensor | None) -> Tensor | None:
    """Of any floating-point precision; indices stay as they are, and so does what is not given."""
    return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor


def _is_floating(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _floating(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in inputs if tensor is not None and _is_floating(tensor)]
