"""Whether PyTorch computes more than values just now: derivatives forward, or a function of torch.func for a batch."""

import torch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of torch.func (`grad`, `vjp`, `jvp`, `vmap`, `jacrev`, ...) or forward-mode differentiation
    (`torch.autograd.forward_ad`) is at work. What is not made of PyTorch's own operators would give them wrong
    derivatives, and values cannot be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
