"""`uniform`: keeps evenly spaced tokens regardless of the image, as a control for the other methods."""

import torch
from torch import Tensor

from .pruning_stage import Reduction, Stage
from .token_pruning import gather_tokens, select_tokens


def keep_evenly_spread(stage: Stage) -> Reduction:
    """Subsampling by ordered dithering (Bayer, 1973): any number of cells, spread as evenly as possible.

    Cells are kept in a fixed order whose first cells, however many, always cover the grid evenly. Later stages keep
    some of the cells that earlier stages kept.
    """
    ranks = dither_ranks(stage.grid, stage.cells.device)
    scores = -ranks[stage.cells].float()
    rows = select_tokens(scores, stage.num_kept)
    return Reduction(rows, gather_tokens(stage.hidden_states, rows), scores)


def dither_ranks(grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """For each cell of a grid, in raster order, its entry in the Bayer matrix: int64 (cells,).

    On two axes the entry's binary digits are those of row xor column and of the row, by turns, the lowest ones first;
    on n axes those of the xor over all of them, and of all but the last.
    """
    places = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    parity = places[0]
    for place in places[1:]:
        parity = parity ^ place
    ranks = torch.zeros(grid, dtype=torch.int64, device=device)
    for bit in range((max(grid) - 1).bit_length()):
        for digits in (parity, *places[:-1]):
            ranks = ranks * 2 + (digits >> bit & 1)
    return ranks.flatten()
