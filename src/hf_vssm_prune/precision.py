"""The precision required for sums, norms and exponents, regardless of the weights' precision."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Converts to float32 unless the tensor is float64: half precision is not enough for states and time steps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
