"""The depthwise convolutions over the remaining tokens in plain PyTorch, the reference for all kernels.

Like those of the kernels, results have the precision of the tokens, under autocast and with weights of another
precision, too.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_pruning import batch_rows, gather_tokens


def depthwise_conv2d_torch(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    kept: Tensor | None = None,
    silu: bool = False,
    stand_ins: Tensor | None = None,
) -> Tensor:
    """The reference for all kernels; for arguments and result, see `depthwise_conv2d`."""
    dtype = hidden_states.dtype
    hidden_states, weight, bias = _of_one_dtype(hidden_states, weight, bias)
    cells = hidden_states
    if stand_ins is not None:
        cells = gather_tokens(hidden_states, stand_ins)
    elif kept is not None:
        batch, num_cells = hidden_states.shape[0], grid[0] * grid[1]
        empty = hidden_states.new_zeros(batch * num_cells, hidden_states.shape[2])
        cells = empty.index_copy(0, batch_rows(kept, num_cells), hidden_states.flatten(0, 1)).unflatten(
            0, (batch, num_cells)
        )
    # Depthwise convolutions are fastest on a CPU if channels are last in memory.
    image = cells.contiguous().unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    cells = image.permute(0, 2, 3, 1).flatten(1, 2)
    if kept is not None:
        cells = gather_tokens(cells, kept)
    return (F.silu(cells, inplace=not cells.requires_grad) if silu else cells).to(dtype)


def causal_conv1d_torch(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: bool = False,
    kept: Tensor | None = None,
    stand_ins: Tensor | None = None,
) -> Tensor:
    """The reference for all kernels; for arguments and result, see `causal_conv1d`."""
    dtype = hidden_states.dtype
    hidden_states, weight, bias = _of_one_dtype(hidden_states, weight, bias)
    sequence = hidden_states if stand_ins is None else gather_tokens(hidden_states, stand_ins)
    before = weight.shape[-1] - 1
    padded = F.pad(sequence.transpose(1, 2), (0, before) if reverse else (before, 0))
    sequence = F.conv1d(padded, weight.flip(-1) if reverse else weight, bias, groups=weight.shape[0]).transpose(1, 2)
    return F.silu(sequence if kept is None else gather_tokens(sequence, kept)).to(dtype)


def _of_one_dtype(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in a precision that represents the numbers of all of them: PyTorch's convolutions need one."""
    given = [tensor.dtype for tensor in (hidden_states, weight, bias) if tensor is not None]
    dtype = functools.reduce(torch.promote_types, given)
    return hidden_states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
