"""`local_top`: keeps the most important tokens of every part of the image. Ours."""

from .grid_windows import score_in_turns
from .pruning_stage import Reduction, Stage, TokenView
from .token_pruning import gather_tokens, select_tokens


def keep_locally_important(stage: Stage) -> Reduction:
    """In every window of the grid (2 x 2 for images, 2 x 2 x 2 for clips), keeps the most important token, then the
    second, as far as the count allows.

    If there are not enough for the next token of every window, the windows with the more important tokens keep theirs.
    This way, no large part of the image is lost while all of another part is kept, the holes that a scan has to cross
    remain short, and the token that stands in for a dropped one (see `stand_in`) was next to it.
    """
    scores = stage.scores()
    rows = select_tokens(score_in_turns(scores, stage.cells, stage.grid), stage.num_kept)
    tokens = gather_tokens(stage.hidden_states, rows)
    return Reduction(rows, tokens, scores, view=TokenView(stand_ins=stage.nearest(rows)))
