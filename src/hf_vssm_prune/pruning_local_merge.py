"""`local_merge`: keeps the most distinct tokens of every part of the image, and merges the others into a neighbour.
Ours."""

from .grid_windows import distance_in_window, score_in_turns
from .pruning_stage import Reduction, Stage, TokenView
from .token_merging import merge_tokens, unit_weights
from .token_pruning import select_tokens


def merge_into_nearest(stage: Stage) -> Reduction:
    """In every window of the grid (2 x 2 for images, 2 x 2 x 2 for clips), keeps the token furthest from the others,
    then the second furthest, as far as the count allows, as in `local_top`. Each of the other tokens is merged into the
    nearest kept token, which becomes their mean and stands in for them (see `stand_in`).

    Each token counts once, regardless of what was merged into it at earlier stages. Kept tokens stay at their
    positions.
    """
    distance = distance_in_window(stage.hidden_states.detach(), stage.cells, stage.grid)
    rows = select_tokens(score_in_turns(distance, stage.cells, stage.grid), stage.num_kept)
    stand_ins = stage.nearest(rows)
    into = rows.gather(1, stand_ins.gather(1, stage.cells))
    tokens, _ = merge_tokens(stage.hidden_states, unit_weights(stage.hidden_states), into, rows)
    return Reduction(rows, tokens, distance, into, view=TokenView(stand_ins=stand_ins))
