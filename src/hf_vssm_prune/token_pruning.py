"""Token pruning for vision state space models, as pure functions in the order of the method.

"Exploring Token Pruning in Vision State Space Models" (ToP, arXiv 2409.18962): a *schedule* says before which layers
tokens go and what share stays; the *importance* of a token is read off the output of the mixer before; the most
important tokens are *selected*; and the *alignment* tells the scans that follow how far apart the tokens left over are,
so that the hidden state goes on decaying across the holes between them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .mixer_output import MixerOutput, token_influence
from .precision import at_least_float32


ALIGNMENTS = ("repeat", "zero_input", "none", "learned")
IMPORTANCES = ("clip", "mean", "l1", "l2", "random", "influence", "worst_influence")


# ---- How many ----------------------------------------------------------------------------------------------------


def count_kept(num_tokens: int, keep_ratio: float) -> int:
    """How many of `num_tokens` stay: max(1, ceil(keep_ratio * num_tokens)).

    The product is rounded to nine decimals first: 0.55 * 100 is 55.00000000000001 in floating point, and means 55.
    """
    return max(1, math.ceil(round(keep_ratio * num_tokens, 9)))


# ---- Importance --------------------------------------------------------------------------------------------------


def token_importance(mixer: MixerOutput, importance: str = "clip") -> Tensor:
    """The importance of each token, from what the mixer tells of it.

    From the mixer's gated output y before its output projection: `clip`, the paper's: the mean over channels of
    max(0, y); to compare with, `mean`, the mean of y; `l1`, the mean of |y|; `l2`, the root of the mean square. From
    the scans' inputs, ours: `influence`, step size · ‖B‖ · ‖C‖, mean over the directions, and `worst_influence`, that
    of the direction in which it is highest, so that a token goes only if no direction needs it; see
    `mixer_output.token_influence`. `random`: uniform numbers from torch's generator (`torch.manual_seed`).

    Args:
        mixer: of shape (batch, tokens, channels).
        importance: one of `IMPORTANCES`.

    Returns:
        float32 (float64 when the input is) of shape (batch, tokens), without gradient.
    """
    y = at_least_float32(mixer.gated.detach())
    if importance == "clip":
        return y.clamp(min=0).mean(-1)
    if importance == "mean":
        return y.mean(-1)
    if importance == "l1":
        return y.abs().mean(-1)
    if importance == "l2":
        return y.square().mean(-1).sqrt()
    if importance == "random":
        return torch.rand(y.shape[:-1], dtype=y.dtype, device=y.device)
    if importance == "influence":
        return token_influence(mixer.scans).mean(1)
    if importance == "worst_influence":
        return token_influence(mixer.scans).amax(1)
    raise ValueError(f"unknown importance {importance!r}; allowed are {list(IMPORTANCES)}.")


# ---- Selection ---------------------------------------------------------------------------------------------------


def select_tokens(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` best scores of each sample, ascending; of equal scores the earlier token is better.

    Args:
        scores: shape (batch, tokens).
        count: how many to select.

    Returns:
        int64 of shape (batch, count).
    """
    ranking = scores.argsort(dim=-1, descending=True, stable=True)
    return ranking[:, :count].sort(dim=-1).values


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Rows `positions` (batch, n) of `tokens` (batch, length, channels): (batch, n, channels)."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def fill_dropped_tokens(hidden_states: Sequence[Tensor], kept_tokens: Sequence[Tensor]) -> Tensor:
    """The latest hidden state of every token: a dropped token has the one with which it was dropped.

    Args:
        hidden_states: one tensor (batch, n, channels) before each stage and one after the last; n tokens still there.
        kept_tokens: for each stage the original ids (batch, n) of the tokens left after it, among all of the first
            hidden states' tokens.

    Returns:
        (batch, all tokens, channels).
    """
    filled = hidden_states[0]
    for kept, states in zip(kept_tokens, hidden_states[1:], strict=True):
        filled = filled.scatter(1, kept.unsqueeze(-1).expand_as(states), states)
    return filled


def nearest_tokens(kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """For each cell of the grid the kept token nearest to it, in steps along rows and columns; of equally near ones the
    one in the higher row, then the one further to the left.

    Args:
        kept: ids of the cells that are left, in raster order, shape (batch, n).
        grid: (height, width).

    Returns:
        Indices into the kept tokens, int64 of shape (batch, height * width).
    """
    num_cells = grid[0] * grid[1]
    dtype = torch.int32 if 2 * sum(grid) * num_cells < 2**31 else torch.int64
    cells = torch.arange(num_cells, dtype=dtype, device=kept.device)
    is_kept = torch.zeros(kept.shape[0], num_cells, dtype=torch.bool, device=kept.device).scatter(1, kept, True)
    # A distance and the cell at that distance are one number, distance * num_cells + cell: the smallest is the nearest.
    nearest = torch.where(is_kept, cells, sum(grid) * num_cells).unflatten(1, grid)
    across, down = (num_cells * _distances(size, kept.device).to(dtype) for size in (grid[1], grid[0]))
    nearest = (nearest.unsqueeze(3) + across).amin(2)
    nearest = (nearest.unsqueeze(2) + down.unsqueeze(2)).amin(1)
    return (is_kept.cumsum(1) - 1).gather(1, nearest.flatten(1).long() % num_cells)


def _distances(size: int, device: torch.device) -> Tensor:
    """Between the places 0, ..., size - 1 of a line: int32 of shape (size, size)."""
    places = torch.arange(size, dtype=torch.int32, device=device)
    return (places.unsqueeze(1) - places).abs()


# ---- Alignment ---------------------------------------------------------------------------------------------------


def path_gaps(positions: Tensor) -> Tensor:
    """The distance g_i = p_i - p_(i-1) of each kept token from the one before it on a scan path; g_1 = 1.

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
        order: the token (its row among those that are left) that a path visits at each step.
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
    """The full grid's paths, shortened to the cells that are left.

    Args:
        full_paths: of the full grid, from `snake_paths`.
        kept: ids of the cells that are left, in raster order, shape (batch, n).
        alignment: one of `ALIGNMENTS`; `none` leaves out the gaps.
    """
    position_of_cell = full_paths.order[0].argsort(dim=-1)  # (paths, cells): the inverse permutation
    positions, order = position_of_cell[:, kept].transpose(0, 1).sort(dim=-1)  # (batch, paths, n)
    moves = full_paths.moves.expand(kept.shape[0], -1, -1).gather(-1, positions)
    return ScanPaths(order, None if alignment == "none" else path_gaps(positions), moves)
