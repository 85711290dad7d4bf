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
    scores = _relative(importance) - _rank_in_window(importance, stage.cells, stage.grid)
    positions = select_tokens(scores, stage.num_kept)
    return Reduction(positions, gather_tokens(stage.hidden_states, positions), scores)


def _rank_in_window(importance: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """How many tokens of its window come before each token: more important ones, or equal ones in an earlier cell."""
    rows, columns = cells // grid[1], cells % grid[1]
    down, across = (-(-size // WINDOW) for size in grid)
    windows = rows // WINDOW * across + columns // WINDOW
    places = (windows * WINDOW + rows % WINDOW) * WINDOW + columns % WINDOW  # window by window
    empty = importance.new_full((importance.shape[0], down * across * WINDOW**2), -torch.inf)
    in_window = empty.scatter(1, places, importance).unflatten(1, (-1, WINDOW**2))
    one, other = in_window.unsqueeze(-1), in_window.unsqueeze(-2)
    before = (other > one) | (other == one).tril(-1)
    return before.sum(-1).flatten(1).gather(1, places).to(importance.dtype)


def _relative(importance: Tensor) -> Tensor:
    """Importance from 0 to less than 1, in the same order."""
    low, high = importance.amin(-1, keepdim=True), importance.amax(-1, keepdim=True)
    return (importance - low) / ((high - low) * 1.001).clamp(min=torch.finfo(importance.dtype).tiny)
