"""Reorders tokens along the paths of a scan, and back."""

from torch import Tensor

from .function_transforms import is_exporting
from .token_pruning import batch_rows, gather_tokens


def gather_along_paths(tokens: Tensor, order: Tensor) -> Tensor:
    """The tokens (batch, length, channels) in the order of each path: (batch, paths, length, channels)."""
    batch, length, _ = tokens.shape
    order = order.expand(batch, -1, -1)
    return tokens.flatten(0, 1).index_select(0, batch_rows(order, length)).unflatten(0, order.shape)


def scatter_along_paths(steps: Tensor, order: Tensor) -> Tensor:
    """The sum over paths of (batch, paths, length, channels), with the row of each step added at the token that it
    visits."""
    batch, _, length, channels = steps.shape
    if is_exporting():
        # If several threads of onnxruntime add rows at the same index, some additions are lost.
        visits = order.argsort(dim=-1).expand(batch, -1, -1)
        return gather_tokens(steps.flatten(0, 1), visits.flatten(0, 1)).unflatten(0, visits.shape[:2]).sum(1)
    tokens = steps.new_zeros(batch * length, channels)
    rows = batch_rows(order.expand(batch, -1, -1), length)
    return tokens.index_add(0, rows, steps.flatten(0, 2)).unflatten(0, (batch, length))
