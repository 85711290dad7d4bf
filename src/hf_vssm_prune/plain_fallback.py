"""Uses plain PyTorch instead of a kernel in float64, under function transforms, and for gradients that are
differentiated again.

A kernel has only a first derivative, for one gradient at a time. In all other cases the plain function is used.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .function_transforms import is_transformed


Function = Callable[..., Tensor]


def left_to(plain: Function) -> Callable[[Function], Function]:
    """Decorates a kernel's function so that `plain`, which has the same arguments, is used in float64 and under
    function transforms."""

    def decorate(kernel: Function) -> Function:
        @functools.wraps(kernel)
        def compute(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            is_plain = hidden_states.dtype == torch.float64 or is_transformed()
            return (plain if is_plain else kernel)(hidden_states, *args, **kwargs)

        return compute

    return decorate


def wants_plain_gradients(grad_output: Tensor) -> bool:
    """Whether, in a backward pass, its result will be differentiated again, or is computed for a batch of gradients."""
    if torch.compiler.is_compiling():
        return False
    is_batched = torch._C._functorch.is_legacy_batchedtensor(grad_output)  # set by `is_grads_batched`
    return torch.is_grad_enabled() or is_transformed() or is_batched


def plain_gradients(plain: Function, inputs: Sequence[Any], grad_output: Tensor) -> list[Tensor | None]:
    """The gradient of each input of `plain`, or None if it needs none. They can be differentiated again if gradients
    are recorded."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad_output.device.type, enabled=False):
        # Views, so that if one input was computed from another, each gets only its own part of the gradient.
        views = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
        wanted = [isinstance(x, Tensor) and x.requires_grad for x in views]
        variables = [x for x, is_wanted in zip(views, wanted, strict=True) if is_wanted]
        gradients = iter(
            torch.autograd.grad(
                plain(*views), variables, grad_output, create_graph=create_graph, materialize_grads=True
            )
        )
    return [next(gradients) if is_wanted else None for is_wanted in wanted]


class DifferentiatedOnce(torch.autograd.Function):
    """Returns the same tensor, but raises an error if its gradient is differentiated again, which the named kernel does
    not support."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, kernel: str) -> Tensor:
        ctx.kernel = kernel
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        if wants_plain_gradients(grad_output):
            raise RuntimeError(
                f"the gradient of backend {ctx.kernel!r} can only be computed once and one at a time, without "
                "`create_graph=True` or `vmap`: use backend 'torch' (`model.config.scan_backend = \"torch\"`)."
            )
        return grad_output, None
