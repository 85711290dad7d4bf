"""`stand_in`: the most important tokens stay, and where one was dropped the convolutions see its neighbour. Ours."""

from .pruning_stage import Reduction, Stage, TokenView
from .pruning_top import keep_most_important


def keep_with_stand_ins(stage: Stage) -> Reduction:
    """Chooses as `top` does. The convolutions then go over all places that tokens had, PlainMamba's over the grid and
    Vim's along the sequence, and see in a dropped token's place the nearest one that is left on the grid
    (`token_pruning.nearest_tokens`): neither zero nor a token from further away, which no dense model ever showed them.
    """
    reduction = keep_most_important(stage)
    return reduction._replace(view=TokenView(stand_ins=stage.nearest(reduction.rows)))
