"""The precision that sums, norms and exponents need, whatever a model's weights have."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already: half precision is too coarse for states and time steps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
