"""`uniform`: tokens spread evenly over the image stay, whatever they show. The control for methods that look."""

import torch
from torch import Tensor

from .pruning_stage import Reduction, Stage
from .token_pruning import gather_tokens, select_tokens


def keep_evenly_spread(stage: Stage) -> Reduction:
    """Spatial subsampling by ordered dithering (Bayer, 1973): any number of cells, spread as evenly as it allows.

    Each cell has its place in a fixed order, in which every beginning covers the image evenly, and the first cells
    stay. Later stages keep a part of what earlier ones kept.
    """
    ranks = dither_ranks(stage.grid, stage.cells.device)
    scores = -ranks[stage.cells].float()
    positions = select_tokens(scores, stage.num_kept)
    return Reduction(positions, gather_tokens(stage.hidden_states, positions), scores)


def dither_ranks(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """For each cell of a grid (height, width), in raster order, its entry in the Bayer matrix: int64 (height * width).

    The entry's binary digits are those of row xor column and of the row, by turns, the lowest ones first.
    """
    row = torch.arange(grid[0], device=device).view(-1, 1)
    column = torch.arange(grid[1], device=device)
    ranks = torch.zeros(grid, dtype=torch.int64, device=device)
    for bit in range((max(grid) - 1).bit_length()):
        digits = ((row ^ column) >> bit & 1) * 2 + (row >> bit & 1)
        ranks = ranks * 4 + digits
    return ranks.flatten()
