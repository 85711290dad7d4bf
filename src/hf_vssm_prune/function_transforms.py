"""What PyTorch does with an operator just now, beside computing its values."""

import torch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of torch.func (`grad`, `vjp`, `jvp`, `vmap`, `jacrev`, ...) or forward-mode differentiation
    (`torch.autograd.forward_ad`) is at work. What is not made of PyTorch's own operators would give them wrong
    derivatives, and values cannot be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_exporting() -> bool:
    """Whether `torch.export` is tracing; False with torch before 2.7, which does not say."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()
