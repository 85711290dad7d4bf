"""Detects what PyTorch does with an operator in addition to computing its values."""

import torch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of torch.func (`grad`, `vjp`, `jvp`, `vmap`, `jacrev`, ...) or forward-mode differentiation
    (`torch.autograd.forward_ad`) is active. Under these, operators that are not PyTorch's own would have wrong
    derivatives, and values cannot be inspected."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether a program is being recorded (`torch.compile`, `torch.export`, `torch.jit.trace`). It will be used for
    other inputs, so nothing in it may depend on the values of these."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exporting() -> bool:
    """Whether `torch.export` is tracing. Always False with torch before 2.7, which does not provide this
    information."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
