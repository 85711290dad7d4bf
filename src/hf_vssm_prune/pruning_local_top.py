"""`local_top`: the most important tokens of every part of the image stay. Ours."""

from .grid_windows import score_in_turns
from .pruning_stage import Reduction, Stage, TokenView
from .token_pruning import gather_tokens, select_tokens


def keep_locally_important(stage: Stage) -> Reduction:
    """Of every window of the grid, 2 x 2 of an image and 2 x 2 x 2 of a clip, the most important token stays, then the
    second, as far as the count allows.

    Where not all windows get their next token, those with the more important one do. No large part of the image is lost
    while elsewhere all is kept, the holes that a scan has to cross stay short, and what stands in for a dropped token
    (see `stand_in`) was next to it.
    """
    scores = stage.scores()
    rows = select_tokens(score_in_turns(scores, stage.cells, stage.grid), stage.num_kept)
    tokens = gather_tokens(stage.hidden_states, rows)
    return Reduction(rows, tokens, scores, view=TokenView(stand_ins=stage.nearest(rows)))
