"""Registers kernels as PyTorch operators with a gradient and a fake kernel, for autograd, torch.compile and export."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, get_type_hints

import torch
from torch import Tensor

from .plain_fallback import plain_gradients, wants_plain_gradients


# The code of each Hub repository is a separate module and registers its own operators.
NAMESPACE = "hf_vssm_prune" if __package__ == "hf_vssm_prune" else f"hub_{zlib.crc32(__name__.encode()):08x}"

# The names of argument types in an operator's schema.
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", bool: "bool"}


class Arguments(Protocol):
    """A named tuple of an operator's arguments: `hidden_states` first, and all tensors before the rest."""

    @property
    def hidden_states(self) -> Tensor: ...

    def check(self) -> None:
        """Raises ValueError if the arguments do not fit together."""


ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


def kernel_operator(
    name: str,
    arguments_of: Callable[..., ArgumentsT],
    plain: Callable[..., Tensor],
    forward: Callable[[ArgumentsT], Tensor],
    backward: Callable[[ArgumentsT, Tensor], Sequence[Tensor]],
    device_types: str | None = None,
) -> Callable[..., Tensor]:
    """Registers a kernel as a PyTorch operator whose output has the shape and dtype of `hidden_states`.

    Args:
        name: name of the operator in `NAMESPACE`.
        arguments_of: class of the arguments, a NamedTuple.
        plain: plain PyTorch function with the same arguments, used for gradients that are differentiated again.
        forward: function from checked arguments to the output. It is not called if the output is empty.
        backward: function from the arguments and the output's gradient to the gradients of all given floating-point
            tensors, in their order and in any precision. It is not called if the output is empty.
        device_types: device types on which it runs; None: all.

    Returns:
        The operator, whose arguments are the fields of the NamedTuple in their order.
    """
    types = get_type_hints(arguments_of)
    schema = ", ".join(f"{SCHEMA_TYPES[kind]} {field}" for field, kind in types.items())
    num_tensors = sum(kind in (Tensor, Tensor | None) for kind in types.values())

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}", mutates_args=(), schema=f"({schema}) -> Tensor", device_types=device_types
    )
    def operator(*inputs: Any) -> Tensor:
        arguments = arguments_of(*inputs)
        arguments.check()
        if arguments.hidden_states.numel() == 0:
            return torch.empty_like(arguments.hidden_states)
        return forward(arguments)

    @operator.register_fake
    def _(hidden_states: Tensor, *_others: Any) -> Tensor:
        return hidden_states.new_empty(hidden_states.shape)

    @torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad_output, {schema}) -> Tensor[]",
        device_types=device_types,
    )
    def operator_backward(grad_output: Tensor, *inputs: Any) -> list[Tensor]:
        if grad_output.numel() == 0:
            return [torch.zeros_like(tensor) for tensor in _floating(inputs)]
        gradients = backward(arguments_of(*inputs), grad_output)
        return [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, _floating(inputs), strict=True)]

    @operator_backward.register_fake
    def _(grad_output: Tensor, *inputs: Any) -> list[Tensor]:
        return [tensor.new_empty(tensor.shape) for tensor in _floating(inputs)]

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:num_tensors])
        ctx.options = inputs[num_tensors:]

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Read only once: with gradient checkpointing, accessing saved tensors recomputes them.
        inputs = (*ctx.saved_tensors, *ctx.options)
        if wants_plain_gradients(grad_output):
            return tuple(plain_gradients(plain, inputs, grad_output))
        gradients = iter(operator_backward(grad_output, *inputs))
        return tuple(next(gradients) if _is_floating(each) else None for each in inputs)

    operator.register_autograd(differentiate, setup_context=save_inputs)
    return operator


def check_tensors(arguments: Any, shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
    """Checks that tensors are on the same device as `hidden_states` and have one of the allowed shapes, given by name.

    Raises:
        ValueError: a tensor does not fit; the message names it.
    """
    device = arguments.hidden_states.device
    for name, allowed in shapes.items():
        tensor = getattr(arguments, name)
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"`{name}` is on the device {tensor.device}, `hidden_states` on {device}.")
        if tensor.shape not in allowed:
            raise ValueError(
                f"`{name}` must have the shape {' or '.join(map(str, allowed))}, got {tuple(tensor.shape)}."
            )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _floating(inputs: Sequence[Any]) -> list[Tensor]:
    return [value for value in inputs if _is_floating(value)]
