"""Tokens along the paths of a scan, and back."""

import torch
from torch import Tensor

from .function_transforms import is_exporting


def gather_along_paths(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (batch, length, channels) in the order of each path: (batch, paths, length, channels)."""
    batch, length, _ = tokens.shape
    rows = visited_rows(order.expand(batch, -1, -1), length)
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def scatter_along_paths(steps: Tensor, order: Tensor) -> Tensor:
    """Sum over paths of (batch, paths, length, channels), each step's row at the token it visited."""
    batch, _, length, channels = steps.shape
    if is_exporting():
        # onnxruntime adds rows to one place in several threads at once, and loses some of them.
        visits = order.argsort(dim=-1).expand(batch, -1, -1)
        return steps.gather(2, visits.unsqueeze(-1).expand(-1, -1, -1, channels)).sum(1)
    tokens = steps.new_zeros(batch * length, channels)
    rows = visited_rows(order.expand(batch, -1, -1), length).flatten()
    return tokens.index_add(0, rows, steps.flatten(0, 2)).unflatten(0, (batch, length))


def visited_rows(order: Tensor, length: int) -> Tensor:
    """Tokens that paths visit, (batch, paths, length), as rows of a batch's tokens, one sample's behind the other's.
    Whole rows are copied faster than PyTorch gathers single entries."""
    first = torch.arange(0, order.shape[0] * length, length, device=order.device)
    return order.long() + first.view(-1, 1, 1)
