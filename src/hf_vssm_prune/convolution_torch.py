"""The depthwise convolutions over tokens that are left, in plain PyTorch: what every kernel is checked against."""

import torch.nn.functional as F
from torch import Tensor

from .token_pruning import gather_tokens


def depthwise_conv2d_torch(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    kept: Tensor | None = None,
    silu: bool = False,
    stand_ins: Tensor | None = None,
) -> Tensor:
    """The reference that every kernel is checked against; arguments and result as in `depthwise_conv2d`."""
    index = None if kept is None else kept.long().unsqueeze(-1).expand_as(hidden_states)
    cells = hidden_states
    if stand_ins is not None:
        cells = gather_tokens(hidden_states, stand_ins.long())
    elif index is not None:
        empty = hidden_states.new_zeros(hidden_states.shape[0], grid[0] * grid[1], hidden_states.shape[2])
        cells = empty.scatter(1, index, hidden_states)
    image = cells.transpose(1, 2).unflatten(2, grid)
    image = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    cells = image.flatten(2).transpose(1, 2)
    if index is not None:
        cells = cells.gather(1, index)
    return F.silu(cells) if silu else cells


def causal_conv1d_torch(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: bool = False,
    kept: Tensor | None = None,
    stand_ins: Tensor | None = None,
) -> Tensor:
    """The reference; arguments and result as in `causal_conv1d`."""
    sequence = hidden_states if stand_ins is None else gather_tokens(hidden_states, stand_ins.long())
    before = weight.shape[-1] - 1
    padded = F.pad(sequence.transpose(1, 2), (0, before) if reverse else (before, 0))
    sequence = F.conv1d(padded, weight.flip(-1) if reverse else weight, bias, groups=weight.shape[0]).transpose(1, 2)
    return F.silu(sequence if kept is None else gather_tokens(sequence, kept.long()))
