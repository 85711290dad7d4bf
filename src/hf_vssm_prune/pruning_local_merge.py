"""`local_merge`: of every part of the image the most distinct tokens stay, and the others go into a neighbour. Ours."""

from .grid_windows import distance_in_window, score_in_turns
from .pruning_stage import Reduction, Stage, TokenView
from .token_merging import merge_tokens, unit_weights
from .token_pruning import select_tokens


def merge_into_nearest(stage: Stage) -> Reduction:
    """Of every window of the grid, 2 x 2 of an image and 2 x 2 x 2 of a clip, the token furthest from the others
    stays, then the second, as far as the count allows, as in `local_top`. Each one that does not stay goes into the
    nearest that does, which becomes the mean of them and stands in for them (see `stand_in`).

    Each token counts once, whatever was merged into it at stages before. It lies where it lay.
    """
    distance = distance_in_window(stage.hidden_states.detach(), stage.cells, stage.grid)
    rows = select_tokens(score_in_turns(distance, stage.cells, stage.grid), stage.num_kept)
    stand_ins = stage.nearest(rows)
    into = rows.gather(1, stand_ins.gather(1, stage.cells))
    tokens, _ = merge_tokens(stage.hidden_states, unit_weights(stage.hidden_states), into, rows)
    return Reduction(rows, tokens, distance, into, view=TokenView(stand_ins=stand_ins))
