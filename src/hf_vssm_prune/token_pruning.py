"""Token pruning for vision state space models, as pure functions in the order of the method.

"Exploring Token Pruning in Vision State Space Models" (ToP, arXiv 2409.18962): a *schedule* says before which layers
tokens are dropped and what fraction is kept; the *importance* of a token is computed from the output of the previous
mixer (`pruning_importances`); the most important tokens are *selected*; and the *alignment* tells the following scans
how far apart the remaining tokens are, so that the hidden state keeps decaying across the gaps between them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .function_transforms import is_exporting


ALIGNMENTS = ("repeat", "zero_input", "none", "learned")


# ---- How many ----------------------------------------------------------------------------------------------------


def count_kept(num_tokens: int, keep_ratio: float) -> int:
    """How many of `num_tokens` are kept: max(1, ceil(keep_ratio * num_tokens)).

    If the product exceeds a whole number by less than 1e-8, this is a rounding error: 0.55 * 100 should be 55, but is
    55.00000000000001. Integers are used for the computation, because `torch.compile` with dynamic shapes handles them
    fastest.
    """
    return max(1, -((_TOLERANCE - round(keep_ratio * _SCALE) * num_tokens) // _SCALE))


# Parts of a token. Those of 900,000 tokens still fit into 64 bits.
_SCALE = 10**13
_TOLERANCE = 10**5


# ---- Selection ---------------------------------------------------------------------------------------------------


def select_tokens(scores: Tensor, count: int) -> Tensor:
    """Rows of the `count` highest scores of each sample, ascending. If scores are equal, the earlier token comes first.

    Args:
        scores: shape (batch, tokens).
        count: how many to select.

    Returns:
        int64 of shape (batch, count).
    """
    return rank_tokens(scores)[:, :count].sort(dim=-1).values


def rank_tokens(scores: Tensor) -> Tensor:
    """Rows (batch, tokens) in the order of their scores, highest first. If scores are equal, the earlier token comes
    first."""
    if is_exporting():
        # ONNX has no stable sort. Its own sort, and that of exported torch programs, put the earlier one first.
        return scores.sort(dim=-1, descending=True).indices
    return scores.argsort(dim=-1, descending=True, stable=True)


def gather_tokens(tokens: Tensor, rows: Tensor) -> Tensor:
    """The rows (batch, n) of tokens (batch, length, channels): (batch, n, channels)."""
    return tokens.flatten(0, 1).index_select(0, batch_rows(rows, tokens.shape[1])).unflatten(0, rows.shape)


def batch_rows(rows: Tensor, length: int) -> Tensor:
    """Converts rows (batch, ...) of each sample's tokens to rows of all samples' tokens concatenated (`length` per
    sample) along one axis. Copying whole rows is several times as fast as gathering single entries in PyTorch."""
    first = torch.arange(0, rows.shape[0] * length, length, device=rows.device)
    return (rows.flatten(1).long() + first.unsqueeze(1)).flatten()


def split_token(tokens: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Splits tokens (batch, length, channels) into those without the token at one position, such as the class token,
    and that token."""
    before, token, after = tokens.tensor_split([place, place + 1], dim=1)
    return torch.cat([before, after], dim=1), token


def fill_dropped_tokens(
    hidden_states: Sequence[Tensor], kept_tokens: Sequence[Tensor], merged_tokens: Tensor | None = None
) -> Tensor:
    """A hidden state for every token of the full sequence.

    A dropped token has its last hidden state; with `merged_tokens`, a merged token has the state of the token that it
    was merged into.

    Args:
        hidden_states: one tensor (batch, n, channels) before each stage and one after the last, with the n tokens
            remaining there.
        kept_tokens: for each stage, the tokens (batch, n) that are left after it.
        merged_tokens: for each token, the token that it was merged into over all stages, or itself if it was not
            merged, shape (batch, all tokens).

    Returns:
        (batch, all tokens, channels).
    """
    filled = hidden_states[0]
    for kept, states in zip(kept_tokens, hidden_states[1:], strict=True):
        filled = filled.scatter(1, kept.unsqueeze(-1).expand_as(states), states)
    return filled if merged_tokens is None else gather_tokens(filled, merged_tokens)


def nearest_tokens(kept: Tensor, grid: tuple[int, ...]) -> Tensor:
    """For each cell of the grid, the nearest kept token, measured in steps along the grid's axes. If several are
    equally near, the first in raster order.

    Args:
        kept: cells of the kept tokens, in raster order, shape (batch, n).
        grid: the full grid's shape, any number of axes.

    Returns:
        Rows of the kept tokens, int64 of shape (batch, cells).
    """
    num_cells = math.prod(grid)
    dtype = torch.int32 if 2 * sum(grid) * num_cells < 2**31 else torch.int64
    cells = torch.arange(num_cells, dtype=dtype, device=kept.device)
    is_kept = torch.zeros(kept.shape[0], num_cells, dtype=torch.bool, device=kept.device).scatter(1, kept, 1)
    # A distance and the cell at that distance are one number, distance * num_cells + cell: the smallest is the nearest.
    nearest = torch.where(is_kept, cells, sum(grid) * num_cells).unflatten(1, grid)
    for axis in range(len(grid), 0, -1):
        distances = num_cells * _distances(grid[axis - 1], kept.device).to(dtype)
        # (..., there, ...) to (..., there, from here, ...), the smallest over what is there
        distances = distances.view(*distances.shape, *(1 for _ in range(len(grid) - axis)))
        nearest = (nearest.unsqueeze(axis + 1) + distances).amin(axis)
    return (is_kept.cumsum(1) - 1).gather(1, nearest.flatten(1).long() % num_cells)


def _distances(size: int, device: torch.device) -> Tensor:
    """Distances between the positions 0, ..., size - 1 of a line: int32 of shape (size, size)."""
    places = torch.arange(size, dtype=torch.int32, device=device)
    return (places.unsqueeze(1) - places).abs()


# ---- Alignment ---------------------------------------------------------------------------------------------------


def path_gaps(positions: Tensor) -> Tensor:
    """The distance g_i = p_i - p_(i-1) of each kept token from the previous one on a scan path; g_1 = 1.

    Args:
        positions: ascending positions on the full path, shape (..., n).

    Returns:
        int64 of shape (..., n); 1 where no token was dropped in between.
    """
    first = torch.ones_like(positions[..., :1])
    return torch.cat([first, positions[..., 1:] - positions[..., :-1]], dim=-1)


class ScanPaths(NamedTuple):
    """The scan paths of tokens on a grid, each tensor int64 of shape (batch or 1, paths, tokens).

    Attributes:
        order: the token (its row among the remaining ones) that a path visits at each step.
        gaps: the distance on the full path from the token visited before. None: no alignment, or nothing was dropped.
        moves: the move that enters the token's cell on the full path: 0 start, 1 right, 2 left, 3 up, 4 down.
    """

    order: Tensor
    gaps: Tensor | None
    moves: Tensor


def snake_paths(grid: tuple[int, int], device: torch.device | None = None) -> ScanPaths:
    """PlainMamba's four continuous paths over a full grid (arXiv 2403.17695): rows from the top, the same
    path backwards, columns from the left, the same path backwards."""
    height, width = grid
    cells = torch.arange(height * width, device=device).view(height, width)
    rows, columns = _snake(cells), _snake(cells.T)
    order = torch.stack([rows, rows.flip(0), columns, columns.flip(0)])

    down = (order // width).diff(dim=-1, prepend=order[:, :1] // width)
    right = (order % width).diff(dim=-1, prepend=order[:, :1] % width)
    moves = (right == 1) * 1 + (right == -1) * 2 + (down == -1) * 3 + (down == 1) * 4
    return ScanPaths(order.unsqueeze(0), None, moves.unsqueeze(0))


def _snake(cells: Tensor) -> Tensor:
    """The cells row by row, every second row backwards."""
    backwards = torch.arange(cells.shape[0], device=cells.device) % 2 == 1
    return torch.where(backwards.unsqueeze(1), cells.flip(1), cells).flatten()


def prune_paths(full_paths: ScanPaths, kept: Tensor, alignment: str) -> ScanPaths:
    """The paths over the full grid, shortened to the cells that are left.

    Args:
        full_paths: paths over the full grid, from `snake_paths`.
        kept: ids of the cells that are left, in raster order, shape (batch, n).
        alignment: one of `ALIGNMENTS`; `none` omits the gaps.
    """
    position_of_cell = full_paths.order[0].argsort(dim=-1)  # (paths, cells): the inverse permutation
    positions, order = position_of_cell[:, kept].transpose(0, 1).sort(dim=-1)  # (batch, paths, n)
    moves = full_paths.moves.expand(kept.shape[0], -1, -1).gather(-1, positions)
    return ScanPaths(order, None if alignment == "none" else path_gaps(positions), moves)
