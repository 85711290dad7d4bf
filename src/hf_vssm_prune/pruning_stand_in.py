"""`stand_in`: keeps the most important tokens; in place of a dropped one, the convolutions see its neighbour. Ours."""

from .pruning_stage import Reduction, Stage, TokenView
from .pruning_top import keep_most_important


def keep_with_stand_ins(stage: Stage) -> Reduction:
    """Selects tokens as `top` does. The convolutions then run over all original positions (PlainMamba's over the grid,
    Vim's along the sequence), and see the nearest remaining token on the grid in place of a dropped one
    (`token_pruning.nearest_tokens`), rather than zero or a more distant token, which they never see in a dense model.
    """
    reduction = keep_most_important(stage)
    return reduction._replace(view=TokenView(stand_ins=stage.nearest(reduction.rows)))
