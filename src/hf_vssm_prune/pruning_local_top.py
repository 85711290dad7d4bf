"""`local_top`: the most important tokens of every part of the image stay. Ours."""

import torch
from torch import Tensor

from .pruning_stage import Reduction, Stage
from .token_pruning import gather_tokens, select_tokens


WINDOW = 2  # side in cells


def keep_locally_important(stage: Stage) -> Reduction:
    """Of every 2 x 2 window of the grid the most important token stays, then the second, as far as the count allows.

    Where not all windows get their next token, those with the more important one do. No large part of the image is lost
    while elsewhere all is kept, the holes that a scan has to cross stay short, and what stands in for a dropped token
    (see `stand_in`) was next to it.
    """
    importance = stage.scores()
    scores = _relative(importance) - _rank_in_window(importance, _windows(stage.cells, stage.grid))
    positions = select_tokens(scores, stage.num_kept)
    return Reduction(positions, gather_tokens(stage.hidden_states, positions), scores)


def _windows(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """The window that each cell lies in."""
    rows, columns = cells // grid[1], cells % grid[1]
    return rows // WINDOW * grid[1] + columns // WINDOW


def _rank_in_window(importance: Tensor, windows: Tensor) -> Tensor:
    """How many tokens of its window come before each token: more important ones, or equal ones with a lower index."""
    order = importance.argsort(dim=-1, descending=True, stable=True)
    sorted_windows = windows.gather(1, order)
    same = (sorted_windows.unsqueeze(-1) == sorted_windows.unsqueeze(1)).tril(-1)
    return torch.zeros_like(importance).scatter(1, order, same.sum(-1).to(importance.dtype))


def _relative(importance: Tensor) -> Tensor:
    """Importance from 0 to less than 1, in the same order."""
    low, high = importance.amin(-1, keepdim=True), importance.amax(-1, keepdim=True)
    return (importance - low) / ((high - low) * 1.001).clamp(min=torch.finfo(importance.dtype).tiny)
