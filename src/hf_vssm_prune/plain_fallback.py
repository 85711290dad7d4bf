"""What kernels leave to plain PyTorch: float64, function transforms, and gradients that are differentiated again.

A kernel has one derivative, and that for single arguments. Where PyTorch asks for more, the plain function answers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .function_transforms import is_transformed


Function = Callable[..., Tensor]


def left_to(plain: Function) -> Callable[[Function], Function]:
    """Decorates a kernel's function: in float64 and under function transforms `plain` computes, which has the same
    arguments."""

    def decorate(kernel: Function) -> Function:
        @functools.wraps(kernel)
        def compute(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            is_plain = hidden_states.dtype == torch.float64 or is_transformed()
            return (plain if is_plain else kernel)(hidden_states, *args, **kwargs)

        return compute

    return decorate


def wants_plain_gradients(grad_output: Tensor) -> bool:
    """In a backward pass: whether its result will be differentiated again, or is computed for a batch of gradients."""
    if torch.compiler.is_compiling():
        return False
    is_batched = torch._C._functorch.is_legacy_batchedtensor(grad_output)  # by `is_grads_batched`
    return torch.is_grad_enabled() or is_transformed() or is_batched


def plain_gradients(plain: Function, inputs: Sequence[Any], grad_output: Tensor) -> list[Tensor | None]:
    """For each input of `plain` its gradient, None where it needs none; they can be differentiated again where
    gradients are recorded."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad_output.device.type, enabled=False):
        # Views: where one input was made from another, each is to have its own part of the gradient only.
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
    """The same tensor; says so where its gradient is to be differentiated again, which the kernel named cannot do."""

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
